"""A PersRM put on a chat model's engine: the views that PAD reads a reply in, and what it makes of finished replies.

Where the chat model is the PersRM's backbone, two rows of one forward do: the base, which is the reward's reference as
well, and the policy, the same model with LoRA and w_p. Any other chat model is read beside two rows of the backbone,
policy and reference, which read its tokens, or their own of the same bytes (:mod:`prefmw.models.token_bytes`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prefmw.alignment import CombinePadAcross, Combiner, combine_pad, combine_pad_by, combine_plain
from prefmw.decoding import Engine, Generation, Request, Sampling, View
from prefmw.decoding.linears import Adapter
from prefmw.decoding.request import BASE
from prefmw.models import ChatModel
from prefmw.models.persrm import PersRM, meaning_of, weights_digest
from prefmw.models.token_bytes import TokenMap, same_tokens
from prefmw.preferences import Message


@dataclass(frozen=True, eq=False)
class Guidance:
    """A PersRM on an engine.

    Attributes:
        persrm: the checkpoint.
        base: the chat model whose replies it guides.
        backbone: the model that it was trained on; the base itself where that is the same.
        combiner: of the views, base first.
        policy: the backbone's name in the engine, for the policy's view.
        adapter: the LoRA's.
        reference: the backbone's for the reference's view; ``None`` where the base is the reference.
        tokens: the base's tokens in the backbone's terms; ``None`` where they are the same.
    """

    persrm: PersRM
    base: ChatModel
    backbone: ChatModel
    combiner: Combiner
    policy: str
    adapter: str | None
    reference: str | None
    tokens: TokenMap | None

    @property
    def label(self) -> str:
        """What a record names it by."""
        return f"{self.persrm.card.name}@{self.persrm.revision}"

    def scale(self, preference: str) -> Tensor | None:
        """w_p of a preference text, (D,), float32; ``None`` where the checkpoint weighs everybody's features alike."""
        if self.persrm.weight is None:
            return None
        return self.persrm.scale(meaning_of(preference, self.backbone))

    def contexts(
        self, messages: Sequence[Message], preference: str, opening: Sequence[tuple[str, bool]] = ()
    ) -> tuple[list[int], list[int]]:
        """The conversation behind the preference's prefix, in the base's tokens and in the backbone's; the reply begins
        with ``opening``.
        """

        def encoded(chat: ChatModel) -> list[int]:
            prefix = self.persrm.card.prefix
            applied = prefix.applied(messages, preference, chat.template.default_system)
            return chat.template.encode(applied, opening=opening)

        base = encoded(self.base)
        return base, base if self.backbone is self.base else encoded(self.backbone)

    def request(
        self,
        messages: Sequence[Message],
        preference: str,
        scale: Tensor | None,
        beta: float,
        sampling: Sampling,
        opening: Sequence[tuple[str, bool]] = (),
    ) -> Request:
        """A reply guided by the PersRM; at beta 0 the base alone, which has the only say then."""
        base, ours = self.contexts(messages, preference, opening)
        views = [View(base)]
        if beta == 0:
            return Request(tuple(views), combine_plain, sampling, (), self.base.stop_ids)
        advance = self.tokens.advance if self.tokens else None
        views.append(View(ours, self.policy, self.adapter, scale, advance))
        if self.reference is not None:
            views.append(View(ours, self.reference, advance=advance))
        return Request(tuple(views), self.combiner, sampling, (beta,), self.base.stop_ids)

    def rewards(
        self,
        messages: Sequence[Message],
        preference: str,
        scale: Tensor | None,
        replies: Sequence[tuple[Sequence[int], bool]],
        engine: Engine,
    ) -> list[float]:
        """log p_theta(y; w_p) - log p_ref(y) of whole replies, nats: the reward of Eq. 13 summed over their tokens.

        Args:
            replies: the base's token ids, and whether the reply came to its end, which counts as a token then.
        """
        base, ours = self.contexts(messages, preference)
        read = [self._as_read(ids, ended) for ids, ended in replies]
        some = [(ours, ids) for ids in read if ids]
        policy = engine.log_probabilities(some, backbone=self.policy, adapter=self.adapter, head_scale=scale)
        if self.reference is None and self.persrm.card.reference == "base":
            said = [self._ended(ids, ended) for ids, ended in replies]
            reference = engine.log_probabilities([(base, ids) for ids in said if ids])
        else:
            reference = engine.log_probabilities(some, backbone=self.reference or BASE)
        sums = iter(float(p.sum() - r.sum()) for p, r in zip(policy, reference, strict=True))
        return [next(sums) if ids else 0.0 for ids in read]

    def best_of(
        self,
        messages: Sequence[Message],
        preference: str,
        scale: Tensor | None,
        engine: Engine,
        submitted: Sequence[Generation],
    ) -> BestOf:
        """The best by reward of replies that were ``submitted``."""

        def choose(replies: Sequence[tuple[Sequence[int], bool]]) -> int:
            rewards = self.rewards(messages, preference, scale, replies, engine)
            return rewards.index(max(rewards))

        return BestOf(submitted, choose)

    def _ended(self, ids: Sequence[int], ended: bool) -> list[int]:
        return [*ids, *([min(self.base.template.end_of_turn or self.base.stop_ids)] if ended else [])]

    def _as_read(self, ids: Sequence[int], ended: bool) -> list[int]:
        """A reply of the base in the backbone's tokens; of another tokenizer its text is read anew, as a whole."""
        if self.tokens is None:
            return self._ended(ids, ended)
        text = self.base.tokenizer.decode(list(ids), skip_special_tokens=True)
        end = min(self.backbone.template.end_of_turn or self.backbone.stop_ids)
        return [*self.backbone.template.encode_reply(text), *([end] if ended else [])]


def put_on(persrm: PersRM, chat: ChatModel, engine: Engine, load_backbone: Callable[[str], ChatModel]) -> Guidance:
    """Make a PersRM known to a chat model's engine; once per engine and checkpoint.

    Args:
        load_backbone: loads the PersRM's backbone by its name, where the chat model is another.

    Raises:
        ModelError: the backbone that was found is not the one that the PersRM was trained on, or its LoRA does not fit.
        ModelNotFoundError: it is not to be found.
    """
    is_backbone = weights_digest(chat.module) == persrm.card.backbone.weights
    backbone = chat if is_backbone else load_backbone(persrm.card.backbone.name)
    persrm.check_backbone(backbone)
    tokens = None if is_backbone or same_tokens(chat, backbone) else TokenMap(chat, backbone)
    name = BASE
    if not is_backbone:
        name = f"backbone {persrm.card.backbone.weights}"
        engine.add_backbone(name, backbone.module, capacity=backbone.capacity, vocabulary=backbone.vocabulary)
    policy = name
    if persrm.linear is not None:
        policy = f"persrm {persrm.revision}"
        head = persrm.linear.to(backbone.device, backbone.module.dtype)
        engine.add_backbone(
            policy, backbone.module, capacity=backbone.capacity, vocabulary=backbone.vocabulary, head=head
        )
    adapter = None
    if persrm.lora:
        adapter = f"persrm {persrm.revision}"
        engine.add_adapter(adapter, Adapter(persrm.lora), backbone=policy)
    by_base = is_backbone or (persrm.card.reference == "base" and tokens is None)
    combiner: Combiner = combine_pad if by_base else combine_pad_by
    if tokens is not None:
        combiner = CombinePadAcross(tokens.columns)
    return Guidance(persrm, chat, backbone, combiner, policy, adapter, None if by_base else name, tokens)


class BestOf(Generation):
    """Several generations as one: its tokens are those of the one that ``choose`` picks, once all are whole.

    Args:
        generations: under way.
        choose: from their token ids, and whether each came to its end, the place of the best.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        choose: Callable[[Sequence[tuple[Sequence[int], bool]]], int],
    ) -> None:
        super().__init__()
        self._generations = generations
        self._choose = choose
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Stop them all."""
        super().cancel()
        for generation in self._generations:
            generation.cancel()

    def __iter__(self) -> Iterator[int]:
        try:
            replies = [list(generation) for generation in self._generations]
            reasons = [generation.finish_reason for generation in self._generations]
            ended = [reason == "stop" for reason in reasons]
            best = 0 if self.cancelled else self._choose(list(zip(replies, ended, strict=True)))
        except BaseException:
            self.finish_reason = "cancelled"
            self.cancel()
            raise
        chosen = self._generations[best]
        self.started_at = min(one.started_at for one in self._generations if one.started_at is not None)
        self.first_token_at = chosen.first_token_at
        self._drew()
        for token in replies[best]:
            if self.cancelled:
                break
            yield token
        self.finish_reason = "cancelled" if self.cancelled else reasons[best]
        self.stop_id = chosen.stop_id
        self._finish(self.finish_reason or "cancelled")


def seeded(request: Request, copy: int) -> Request:
    """The request's ``copy``-th fellow: the same with another seed, whose past nobody keeps but the first one's."""
    if copy == 0:
        return request
    sampling = replace(request.sampling, seed=(request.sampling.seed + copy) % 2**63)
    return replace(request, sampling=sampling, owner=None)
