"""What steering costs: our engine beside transformers' own ways, in one run, interleaved.

Ways of decoding one reply, all sampled with the same temperature and nucleus:

- ``none``, ``linear``, ``pad``, ``drift``: the engine's, with one view of a backbone, two, two and five, for four
  weights.
- ``generate``: transformers' ``generate``, no steering.
- ``two-forward``: Linear Alignment as its authors' released code does it, two forwards a token, one after the other.
- ``cfg``: transformers' classifier-free guidance (``guidance_scale``), the same contrast in another form.

Several users are requests submitted together (ours), or a batch (theirs); what a token takes is seen while all of them
reply, which ours do once their contexts are parked. What the engine does to a model's products
and attention acts in its own forwards alone, so the other ways compute what transformers does as it comes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefmw.alignment import combine_drift, combine_linear, combine_pad, combine_plain, nucleus, restrict, scaled
from prefmw.decoding import Adapter, Engine, Generation, Request, Sampling, View
from prefmw.errors import UsageError

SHAPES: dict[str, dict[str, Any]] = {
    "60m": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 10},
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Llama architectures to fill with random weights, for machines without the real ones."""

COMMON = {"vocab_size": 32000, "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": None}

TEMPERATURE, TOP_P, RATIO, BETA, RANK = 0.7, 0.8, 2.0, 1.0, 8
"""The sampling of every way, and the parameters of ours."""

DIALS = (0.9, 0.7, 0.5, 0.3)
"""The sizes of the weights that act under Drift."""

PEAK = 8.0
"""By which the last hidden state of random weights is scaled: their logits then vary by four, like a trained model's,
and a nucleus holds tens of tokens rather than most of the vocabulary.
"""

PRINCIPLE = 40
"""Tokens by which the context with the principle is the longer one."""

NEXT = 32
"""Tokens of the user's next turn, for the parked time to the first token."""

VIEWS = {"none": 1, "linear": 2, "pad": 2, "drift": 1 + len(DIALS)}
"""The views of each method's replies: rows of a forward that one user takes."""

METHODS = tuple(VIEWS)
OTHERS = ("generate", "two-forward", "cfg")


@dataclass
class Way:
    """One way of decoding and what was seen of it: per round, milliseconds a token and tokens a second."""

    name: str
    run: Callable[[], tuple[float, float, float]]
    ttft: list[float] = field(default_factory=list)
    ms_per_token: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


def check_shape(name: str) -> None:
    """Raise UsageError for a shape that is not among :data:`SHAPES`."""
    if name not in SHAPES:
        raise UsageError(f"no shape '{name[:40]}'; there is {', '.join(SHAPES)}")


def check_methods(names: Sequence[str]) -> None:
    """Raise UsageError for a method that is not among :data:`METHODS`."""
    if unknown := set(names) - set(METHODS):
        raise UsageError(f"no method '{min(unknown)}' to time; choose from {', '.join(METHODS)}")


def check_context(model: Any, context: int, tokens: int) -> None:
    """Raise UsageError for a context that leaves a model no room for two turns' replies."""
    room = model.config.get_text_config().max_position_embeddings
    if context + PRINCIPLE + 2 * tokens + NEXT > room:
        raise UsageError(
            f"a context of {context} tokens, {PRINCIPLE} of a principle, {NEXT} of a second turn and two replies of "
            f"{tokens} exceed the model's {room}; lower --context or --tokens"
        )


def random_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A Llama of a shape among :data:`SHAPES` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**COMMON, **SHAPES[shape]}, eos_token_id=None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.model.norm.weight.data.fill_(PEAK)
    return model


def measure(
    model: Any,
    *,
    methods: Sequence[str],
    users: int,
    context: int,
    tokens: int,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of ``prefmw bench decode --json`` for one model, number of users and length of context.

    Every round runs every way once, in turn; ratios are taken round by round, and medians of them told with their
    lowest and highest.

    Raises:
        UsageError: a context beyond the model's.
    """
    check_context(model, context, tokens)
    bench = _Bench(model, users=users, context=context, tokens=tokens)
    names = list(dict.fromkeys(("none", *methods)))
    ours = [Way(name, lambda name=name: bench.engine_reply(name)) for name in names]  # type: ignore[misc]
    theirs = [
        Way("generate", bench.generate),
        Way("two-forward", bench.two_forward),
        Way("cfg", bench.guidance),
    ]
    try:
        for way in (*ours, *theirs):
            way.run()  # warms up
        for number in range(rounds):
            ways = [*ours, *theirs]
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                ttft, each, rate = way.run()
                way.ttft.append(ttft)
                way.ms_per_token.append(each)
                way.tokens_per_s.append(rate)
                progress()
        parked = {name: [bench.parked(name) for _ in range(rounds)] for name in names}
        packed = round(bench.engine.packed_bytes() / 2**20, 1)
        memory = {name: _memory_mb(model, name, users=users, context=context, tokens=tokens) for name in names}
    finally:
        bench.engine.close()
    seen = {way.name: way for way in (*ours, *theirs)}
    rows = []
    for name in [*methods, *OTHERS]:
        row = {
            "method": name,
            "users": users,
            "context": context,
            "dtype": str(model.dtype).removeprefix("torch."),
            "rounds": rounds,
            "ms_per_token": _median(seen[name].ms_per_token),
            "tokens_per_s": _median(seen[name].tokens_per_s),
            "ttft_ms": _median(seen[name].ttft),
        }
        for other, key in (
            ("none", "ratio_to_plain"),
            ("generate", "ratio_to_generate"),
            ("two-forward", "ratio_to_two_forward"),
            ("cfg", "ratio_to_cfg"),
        ):
            row |= _ratio(key, seen[name].ms_per_token, seen[other].ms_per_token)
        if name in parked:
            cold, warm = zip(*parked[name], strict=True)
            row["parked_ttft_ms"] = _median(warm)
            row |= _ratio("parked_to_cold", warm, cold)
            row["memory_mb"] = memory[name]
            row["packed_mb"] = packed
        rows.append(row)
    return rows


def one_by_one(model: Any, name: str, *, users: int, context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of users of a method together, over those of the same users one after another: while they reply,
    their contexts being parked, and from their prompts on.
    """
    bench = _Bench(model, users=users, context=context, tokens=tokens)
    kinds = [(kept, together) for kept in (True, False) for together in (True, False)]
    seconds: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in kinds}
    try:
        bench.whole_seconds(name, kept=True, together=True)  # warms up, and parks the contexts
        for _ in range(rounds):
            for kept, together in kinds:
                seconds[kept, together].append(bench.whole_seconds(name, kept=kept, together=together))
    finally:
        bench.engine.close()
    count = users * tokens
    found: dict[str, Any] = {}
    for kept, prefix in ((True, "decode_"), (False, "")):
        all_at_once, in_turn = seconds[kept, True], seconds[kept, False]
        found[f"{prefix}tokens_per_s_together"] = _median([count / one for one in all_at_once])
        found[f"{prefix}tokens_per_s_one_by_one"] = _median([count / one for one in in_turn])
        found |= _ratio(f"{prefix}together_to_one_by_one", in_turn, all_at_once)
    return found


class _Bench:
    """The ways on one model: contexts of random tokens, the engine, and transformers' own."""

    def __init__(self, model: Any, *, users: int, context: int, tokens: int) -> None:
        self._model = model
        self._tokens = tokens
        self._device = model.get_input_embeddings().weight.device
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)

        def texts(length: int) -> list[list[int]]:
            return torch.randint(3, vocabulary, (users, length), generator=generator).tolist()

        self._without, self._with = texts(context), texts(context + PRINCIPLE)
        capacity = model.config.get_text_config().max_position_embeddings
        self.engine = Engine(
            model,
            capacity=capacity,
            vocabulary=vocabulary,
            queue_size=users,
            max_rows=users * max(VIEWS.values()),  # nobody waits for another's reply to end
            parked_bytes=1 << 40,
        )
        self._scale = torch.linspace(0.9, 1.1, model.config.get_text_config().hidden_size, device=self._device)
        self.engine.add_adapter("persrm", self._random_adapter())

    def _random_adapter(self) -> Adapter:
        """A LoRA of rank 8 on all linear layers but the head, as PAD's."""
        matrices = {}
        head = self._model.get_output_embeddings()
        for name, module in self._model.named_modules():
            if type(module) is torch.nn.Linear and module is not head:
                down = torch.randn(RANK, module.in_features) * 0.01
                up = torch.randn(module.out_features, RANK) * 0.01
                matrices[name] = (down.to(module.weight), up.to(module.weight))
        return Adapter(matrices)

    def _request(self, name: str, user: int, more: Sequence[int] = (), owner: str | None = None) -> Request:
        top_k = 10 if name == "pad" else None
        sampling = Sampling(temperature=TEMPERATURE, top_p=TOP_P, top_k=top_k, max_tokens=self._tokens, seed=user)
        plain, steered = ([*texts[user], *more] for texts in (self._without, self._with))
        if name == "none":
            return Request((View(plain),), combine_plain, sampling, (), owner=owner)
        if name == "linear":
            views = (View(plain), View(steered))
            return Request(views, combine_linear, sampling, (RATIO,), owner=owner)
        if name == "drift":
            poles = [View([*steered[: -len(more) or None], dial, *more]) for dial in range(3, 3 + len(DIALS))]
            return Request(
                (View(plain), *poles), combine_drift, sampling, (1.0, *DIALS, *(0.7 for _ in DIALS)), owner=owner
            )
        policy = View(steered, adapter="persrm", head_scale=self._scale)
        return Request((View(steered), policy), combine_pad, sampling, (BETA,), owner=owner)

    def engine_reply(self, name: str) -> tuple[float, float, float]:
        """Milliseconds to the first token and per token after it, and tokens a second, of all users together.

        The prompts of several users are read in turn, so that the first replies may end before the last begin. What a
        token takes is therefore seen with their contexts parked.
        """
        several = len(self._without) > 1
        ttft, each, rate = self._seen(*self.ask(name, kept=several))
        if several:
            _, each, _ = self._seen(*self.ask(name, kept=True))
            self.engine.forget()
        return ttft, each, rate

    def ask(self, name: str, *, kept: bool) -> tuple[float, list[Generation]]:
        """When all users asked, and their replies, which have ended; ``kept`` as below."""
        requests = self._requests(name, kept)
        started = time.perf_counter()
        generations = [self.engine.submit(request) for request in requests]
        for generation in generations:
            list(generation)
        return started, generations

    def _seen(self, started: float, generations: Sequence[Generation]) -> tuple[float, float, float]:
        firsts = [generation.first_token_at or started for generation in generations]
        ended = max(generation.ended_at or started for generation in generations)
        return _figures(started, max(firsts), ended, self._tokens, len(generations))

    def _requests(self, name: str, kept: bool) -> list[Request]:
        """A method's request of every user, whose contexts are ``kept`` from one time to the next or read anew."""
        users = range(len(self._without))
        return [self._request(name, user, owner=f"user {user}" if kept else None) for user in users]

    def whole_seconds(self, name: str, *, together: bool, kept: bool) -> float:
        """Seconds for a method's reply to every user, whose contexts are ``kept`` from one time to the next or read
        anew.
        """
        if together:
            started, _ = self.ask(name, kept=kept)
            return time.perf_counter() - started
        requests = self._requests(name, kept)
        started = time.perf_counter()
        for request in requests:
            list(self.engine.submit(request))
        return time.perf_counter() - started

    def parked(self, name: str) -> tuple[float, float]:
        """Milliseconds to the first token of the first user's second turn: cold, and with its past parked."""
        seconds = []
        for kept in (False, True):
            said = list(self.engine.submit(self._request(name, 0, owner="bench")))
            if not kept:
                self.engine.forget("bench")
            generation = self.engine.submit(self._request(name, 0, [*said, *range(3, 3 + NEXT)], "bench"))
            next(iter(generation))
            generation.cancel()
            list(generation)
            seconds.append(1000 * generation.prefill_s)
            self.engine.forget("bench")
        return seconds[0], seconds[1]

    # transformers' own ways.

    def _times(self, run: Callable[[_Clock], None]) -> tuple[float, float, float]:
        clock = _Clock(self._device)
        run(clock)
        return _figures(clock.started, clock.tokens[0], clock.tokens[-1], self._tokens, len(self._without))

    def generate(self) -> tuple[float, float, float]:
        """``generate`` on the contexts without a principle."""
        return self._times(lambda clock: self._generate(clock, self._without))

    def guidance(self) -> tuple[float, float, float]:
        """Classifier-free guidance: scores of the context with the principle against those without."""
        without = torch.tensor(self._without, device=self._device)
        return self._times(
            lambda clock: self._generate(clock, self._with, guidance_scale=1 + RATIO, negative_prompt_ids=without)
        )

    def _generate(self, clock: _Clock, contexts: list[list[int]], **options: Any) -> None:
        from transformers import LogitsProcessorList

        ids = torch.tensor(contexts, device=self._device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=self._tokens,
            min_new_tokens=self._tokens,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
            **options,
        )
        clock.tick()

    def two_forward(self) -> tuple[float, float, float]:
        """Linear Alignment as the authors' code decodes it."""
        return self._times(self._two_forward)

    @torch.inference_mode()
    def _two_forward(self, clock: _Clock) -> None:
        caches: list[Any] = [None, None]
        tokens = [torch.tensor(texts, device=self._device) for texts in (self._without, self._with)]
        for _ in range(self._tokens):
            logits = []
            for index in (0, 1):
                output = self._model(tokens[index], past_key_values=caches[index], use_cache=True, logits_to_keep=1)
                caches[index] = output.past_key_values
                logits.append(output.logits[:, -1].float())
            aligned = scaled(logits[0], logits[1], RATIO)
            bounded = restrict(aligned, logits[1], nucleus(logits[1], TOP_P, TEMPERATURE))
            drawn = torch.multinomial((bounded / TEMPERATURE).softmax(dim=1), 1)
            drawn.tolist()
            clock.tick()
            tokens = [drawn, drawn]


def _memory_mb(model: Any, name: str, **shape: int) -> float:
    """What replies take, in an engine of their own, beside the weights and packed copies of them: on a GPU at most,
    elsewhere in its slots.
    """
    on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    bench = _Bench(model, **shape)
    try:
        bench.ask(name, kept=False)
        taken = torch.cuda.max_memory_allocated() - before if on_gpu else bench.engine.cache_bytes()
    finally:
        bench.engine.close()
    return round(taken / 2**20, 1)


class _Clock:
    """When each token came: ticked by hand, or by ``generate`` as a logits processor, before each token is drawn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.started = time.perf_counter()
        self.tokens: list[float] = []

    def tick(self) -> None:
        """A token came."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.tokens.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick()
        return scores


def _figures(started: float, first: float, ended: float, tokens: int, users: int) -> tuple[float, float, float]:
    """Milliseconds to the last user's first token, milliseconds a token of that user's after it, and tokens a second of
    all users from the beginning to the end, prompts included.
    """
    return 1000 * (first - started), 1000 * (ended - first) / (tokens - 1), users * tokens / (ended - started)


def _ratio(key: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds' ratios, and their lowest and highest."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {key: round(statistics.median(ratios), 3), f"{key}_range": [round(min(ratios), 3), round(max(ratios), 3)]}


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)
