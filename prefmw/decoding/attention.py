"""Attention of single tokens on a CPU, for models in bfloat16 with keys and values of every head's own.

Fused attention in bfloat16 has no quick way for one query a head, as decoding has it. Two products with a softmax in
float32 between them, as transformers' ``eager`` has it, take half its time where the keys of all rows lie side by side;
where they do not, every query is asked twice, which it is quicker at.

This is an attention implementation by transformers' own interface. For everything but an engine's single tokens it is
transformers' ``sdpa``, so whoever else uses the model meanwhile gets that.

Shapes: R rows, N queries a row, H heads, T positions, D head size.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefmw.decoding.underway import under_way

OURS, USUAL = "prefmw_single", "sdpa"

_changing = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""How many engines use a model with it."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What queries (R, H, N, D) see of keys and values (R, H, T, D), a mask (R, 1, N, T) added: (R, N, H, D)."""
    more = {"scaling": scaling, "position_bias": position_bias, "softcap": softcap, **kwargs}
    ours = under_way.owner is not None and query.shape[2] == 1 and position_bias is None and softcap is None
    if attention_mask is None or not ours:
        whole: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **more)[0]
        return whole, None
    if not (key.is_contiguous() and value.is_contiguous()):
        twice = torch.cat([query, query], dim=2)
        both: Tensor = sdpa_attention_forward(module, twice, key, value, attention_mask, **more)[0]
        return both[:, :1], None
    scores = torch.matmul(query, key.transpose(2, 3)).float()  # (R, H, 1, T)
    scores = scores.mul_(query.shape[3] ** -0.5 if scaling is None else scaling).add_(attention_mask)
    return torch.matmul(scores.softmax(3).to(value.dtype), value).transpose(1, 2).contiguous(), None


AttentionInterface.register(OURS, attend)
AttentionMaskInterface.register(OURS, sdpa_mask)


def use_on(model: Any, device: torch.device) -> bool:
    """Have a model use it, where that is quicker and the model is one that uses ``sdpa``; whether it does."""
    config = model.config
    if device.type != "cpu" or model.dtype != torch.bfloat16 or config.sub_configs:
        return False
    heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "num_key_value_heads", heads) != heads or not model._can_set_attn_implementation():
        return False
    with _changing:
        if config._attn_implementation == USUAL:
            model.set_attn_implementation(OURS)
        if config._attn_implementation != OURS:
            return False
        _users[model] = _users.get(model, 0) + 1
    return True


def give_back(model: Any) -> None:
    """Undo one :func:`use_on`; the last one gives the model its own attention back, if it has no other by now."""
    with _changing:
        _users[model] -= 1
        if not _users[model]:
            del _users[model]
            if model.config._attn_implementation == OURS:
                model.set_attn_implementation(USUAL)
