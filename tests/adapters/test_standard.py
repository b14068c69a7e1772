"""LangChain's own standard suites, on the embedded model."""

from __future__ import annotations

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from prefmw.adapters.langchain import ChatPrefMW
from tests.adapters.scripted import dutiful, scripted
from tests.toymodels import save_chat_model


class OnTiny:
    chat_model_class = ChatPrefMW

    @property
    def chat_model_params(self) -> dict:
        return {"model": "tiny", "user_id": "alice", "log": False}

    @property
    def standard_chat_model_params(self) -> dict:
        """Without what a model in this process has no use for: timeout and retries of a network, an API key."""
        return {"temperature": 0, "max_tokens": 40, "stop": []}

    @property
    def init_from_env_params(self) -> tuple[dict, dict, dict]:
        """None: settings of the environment are read at the first call, not when the object is built."""
        return {}, {}, {}

    @property
    def has_tool_calling(self) -> bool:
        """The chat template of tiny takes no tools; the tests of those run on a scripted model."""
        return False

    @property
    def has_structured_output(self) -> bool:
        """It rests on tools."""
        return False

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def enable_vcr_tests(self) -> bool:
        """There is no HTTP to record."""
        return False


class TestUnit(OnTiny, ChatModelUnitTests):
    pass


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
class TestIntegration(OnTiny, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _other_model(self, toy):
        self._toy = str(toy)

    @property
    def model_override_value(self) -> str:
        return self._toy


class TestToolsOnAScriptedModel(TestIntegration):
    """What tiny cannot: its template takes no tools. This model's does, and it follows a script."""

    @pytest.fixture(autouse=True)
    def _scripted(self, tmp_path_factory):
        folder = tmp_path_factory.getbasetemp() / "scripted"
        if not folder.exists():
            save_chat_model(folder, "hermes", context=4096)
        scripted(folder, dutiful)
        self._folder = str(folder)

    @property
    def chat_model_params(self) -> dict:
        return {"model": self._folder, "user_id": "alice", "log": False}

    @property
    def standard_chat_model_params(self) -> dict:
        return {"temperature": 0, "max_tokens": 400, "stop": []}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True
