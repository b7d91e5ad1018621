"""What int8 or int4 change, against the model as it is."""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from evaluation.asking import encode_question, prefill
from evaluation.testsets import Question
from model_io.beginnings import Beginnings
from model_io.pixels import preprocess_image
from model_io.tokens import Tokenizer
from qilin_min import Qilin


@dataclass(frozen=True, slots=True)
class QuantisedChange:
    """What the linear layers in fewer bits do to the true answers of some questions."""

    bits: str
    dtype: str  # of the model as it is
    n: int
    n_tokens: int
    perplexity_before: float
    perplexity_after: float
    logits_off: float  # root mean square, as a share of the logits' own
    same_first: float  # share of tokens whose likeliest word is the same
    kl: float


@dataclass(slots=True)
class Sums:
    """What is added up over batches."""

    n_tokens: int = 0
    off: float = 0.0
    size: float = 0.0
    before: float = 0.0
    after: float = 0.0
    same: int = 0
    kl: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor) -> None:
        """Logits (n, V) of the model as it is and of the other, and the true ids (n,)."""
        # a constant added to all changes nothing
        off = after - before
        off = off - off.mean(-1, keepdim=True)
        centred = before - before.mean(-1, keepdim=True)
        self.off += float(off.square().sum())
        self.size += float(centred.square().sum())
        before = before.log_softmax(-1)
        after = after.log_softmax(-1)
        self.n_tokens += len(ids)
        self.before -= float(before.gather(1, ids[:, None]).sum())
        self.after -= float(after.gather(1, ids[:, None]).sum())
        self.same += int((before.argmax(-1) == after.argmax(-1)).sum())
        self.kl += float((before.exp() * (before - after)).sum())


def true_logits(
    beginnings: Beginnings,
    prompts: list[list[int]],
    answers: list[list[int]],
    pixels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (n, V), on the CPU, that follow a batch's prompts and true answers, one token
    at a time as generate() decodes, which is where int8 computes otherwise; and the ids (n,)."""
    model = beginnings.model
    longest = max(map(len, answers))
    cache, logits, _ = prefill(beginnings, prompts, pixels, longest)
    room = cache.max_length - max(map(len, prompts))
    one_each = torch.ones(len(answers), dtype=torch.int64, device=logits.device)
    steps = [logits]
    for t in range(min(longest, room) - 1):
        # a row that has ended repeats its last token, which is not kept
        new = [[answer[min(t, len(answer) - 1)]] for answer in answers]
        ids = torch.tensor(new, device=logits.device)
        steps.append(model(ids, cache=cache, lengths=one_each))
    steps = torch.stack(steps, 1).float().cpu()  # (B, T, V)
    kept = []
    ids = []
    for row, answer in zip(steps, answers, strict=True):
        kept.append(row[: len(answer)])
        ids += answer[: len(row)]
    return torch.cat(kept), torch.tensor(ids)


@torch.no_grad()
def quantised_change(
    plain: Qilin,
    model: Qilin,
    tokenizer: Tokenizer,
    questions: list[Question],
    *,
    bits: str,
    batch_size: int,
    n: int = 64,
) -> QuantisedChange:
    """What `bits` do to the logits of the first n true answers: `model` against `plain`, the same
    weights as they are; both are in memory for it."""
    questions = questions[:n]
    size = model.config.vision.image_size
    mode = model.config.image_mode
    sums = Sums()
    of_plain = Beginnings(plain)
    of_bits = Beginnings(model)
    starts = range(0, len(questions), batch_size)
    for start in tqdm(starts, desc=f"{bits} against plain", unit="batch", disable=None):
        batch = questions[start : start + batch_size]
        pixels = []
        for question in batch:
            pixels += [preprocess_image(picture, size, mode) for picture in question.pictures]
        pixels = torch.stack(pixels) if pixels else None  # (M, 3, H, W)
        prompts = [encode_question(question, tokenizer, model.config) for question in batch]
        answers = [tokenizer.encode(q.truth) + [tokenizer.eos_id] for q in batch]
        before, ids = true_logits(of_plain, prompts, answers, pixels)
        after, _ = true_logits(of_bits, prompts, answers, pixels)
        sums.add(before, after, ids)
    return QuantisedChange(
        bits=bits,
        dtype=str(next(plain.parameters()).dtype).removeprefix("torch."),
        n=len(questions),
        n_tokens=sums.n_tokens,
        perplexity_before=math.exp(sums.before / sums.n_tokens),
        perplexity_after=math.exp(sums.after / sums.n_tokens),
        logits_off=math.sqrt(sums.off / sums.size),
        same_first=sums.same / sums.n_tokens,
        kl=sums.kl / sums.n_tokens,
    )
