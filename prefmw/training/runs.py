"""What the trainers' runs have in common: the folder that a run claims, the checkpoint that it goes on from, when it
stops, its type and memory on a CPU, its progress.
"""

from __future__ import annotations

import ctypes
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefmw.errors import TrainingError, UsageError
from prefmw.training import unfinished

_log = logging.getLogger(__name__)


def claim(out: Path, name: str, about: Mapping[str, Any], other: str) -> None:
    """Write what is run beside the run, as the file ``name``, or refuse a folder that holds something else.

    Raises:
        UsageError: ``out`` is a file, or holds ``other`` or what is no run.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder; name one with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / name).is_file():
        raise UsageError(f"{out} is not empty and holds no run to resume; name another folder with --out")
    unfinished.claim(out / name, about, other)


def processes() -> Any:
    """The processes that train together, accelerate's ``PartialState``: those of ``accelerate launch`` or ``torchrun``,
    or this one alone. Trainings compute on CUDA or on the CPU; of the latter's processes accelerate counts more than
    one only where it is told so. While one of them draws a front, the others wait for up to a day.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def device_of(state: Any) -> str:
    """The device of this process, as models are loaded to it."""
    return "cpu" if state.device.type == "cpu" else str(state.device)  # accelerate's "cpu:0" among several


def fastest_dtype() -> torch.dtype:
    """bfloat16 where its products are the faster ones, by measurement: a CPU without such instructions emulates them,
    at a tenth of float32's speed.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(2048, 192, dtype=dtype), torch.ones(192, 640, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def keep_freed_memory() -> None:
    """Let glibc reuse the large blocks of one step in the next instead of giving them back to the system, which would
    hand them out again page by page: a third of the time of a step on a CPU. Elsewhere it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def check_finite(numbers: Tensor, where: str, out: Path) -> None:
    """Raise TrainingError, which says where, what is kept and what to do, where some number is NaN or infinite."""
    if bool(numbers.detach().isfinite().all()):
        return
    kept = last_whole_checkpoint(out)
    left = f"the last good checkpoint is {kept}" if kept else "there was no checkpoint yet"
    raise TrainingError(
        f"{where}: the training met a number that is not finite and stopped; {left}; lower the learning rate, or look "
        "at the data around it"
    )


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose last file was written: a kill may leave one half."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), str(state.parent)))
        except (ValueError, KeyError):
            continue
    return max(whole)[1] if whole else None


class Bar(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with the loss behind it, in place of dictionaries on stdout."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        shown = {key: f"{value:.3f}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class LikeLengths(torch.utils.data.Sampler[int]):
    """All indices in batches of like lengths, shuffled by seed and epoch alone, so that a resumed run meets the batches
    that it would have met.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng, order = random.Random(f"{self._seed}:{self._epoch}"), list(range(len(self._lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * self._batch):
            some = sorted(order[start : start + 50 * self._batch], key=lambda index: self._lengths[index])
            batches += [some[at : at + self._batch] for at in range(0, len(some), self._batch)]
        rng.shuffle(batches)
        return iter([index for batch in batches for index in batch])


def lora_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A PEFT model's LoRA by layer, as (A, B scaled by alpha / r), float32 on the CPU."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            scaled = up.detach().float() * module.scaling["default"]
            found[name] = (down.detach().float().cpu(), scaled.cpu())
    return found


@contextmanager
def bars(shown: bool) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars on stderr: a name makes one, which is told how much of how much is done."""
    with Progress(console=Console(file=sys.stderr), disable=not shown) as progress:

        def bar(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


@contextmanager
def head_on_replies_alone() -> Iterator[None]:
    """Have TRL's head read the replies' tokens alone on a CPU, as it does where it has Triton: the prompts' cost four
    fifths of a step there, and count for nothing.
    """
    from trl.trainer import utils

    before = getattr(utils, "_use_triton", None)
    if before is None or torch.cuda.is_available():
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def usual_arguments(steps: float, *, progress: bool, seed: int) -> dict[str, Any]:
    """What every trainer of transformers' and TRL's is told here, for a run of so many steps."""
    return {
        "lr_scheduler_type": "cosine",
        "use_cpu": not torch.cuda.is_available(),
        "save_steps": max(1, min(200, int(steps) // 10)),
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, int(steps) // 20)),
        "disable_tqdm": not progress,
        "report_to": [],
        "seed": seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def go_on(trainer: Any, out: Path, what: str, *, progress: bool) -> None:
    """Train from the last whole checkpoint in ``out``, or from the start, with a bar of our own or none."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if progress:
        trainer.add_callback(Bar())
    begun = last_whole_checkpoint(out)
    if begun:
        _log.info("%s goes on from %s", what, begun)
    trainer.train(resume_from_checkpoint=begun)
