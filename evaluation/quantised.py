"""What int8 or int4 change, against the model as it is."""

import math
from collections import defaultdict

import torch
from tqdm import tqdm

from evaluation.asking import encode_question, prefill
from model_io.options import open_model
from model_io.pixels import preprocess_image


def true_logits(model, prompts, answers, pixels):
    """Logits float32 (n, V), on the CPU, that follow a batch's prompts and true answers, one token at a time as generate() decodes, which is where int8 computes otherwise; and the ids (n,)."""
    cache, logits, _ = prefill(model, prompts, pixels, max(map(len, answers)))
    steps = [logits]
    for t in range(min(max(map(len, answers)), cache.max_length - max(map(len, prompts))) - 1):
        ids = torch.tensor([[a[min(t, len(a) - 1)]] for a in answers], device=logits.device)
        steps.append(
            model(
                ids,
                cache=cache,
                lengths=torch.ones(len(answers), dtype=torch.int64, device=logits.device),
            )
        )
    steps = torch.stack(steps, 1).float().cpu()  # (B, T, V)
    return torch.cat([row[: len(a)] for row, a in zip(steps, answers)]), torch.tensor(
        [i for a in answers for i in a[: len(steps[0])]]
    )


@torch.no_grad()
def quantised_change(args, questions, model, tokenizer, n=64):
    """What --quantize does to the logits of the first n true answers, against the same weights as they are; both are in memory for it."""
    plain = open_model(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        device=args.device,
        dtype=args.dtype,
        quantize=None,
    )[0]
    questions, total = questions[:n], defaultdict(float)
    for start in tqdm(
        range(0, len(questions), args.batch_size),
        desc=f"{args.quantize} against plain",
        unit="batch",
        disable=None,
    ):
        batch = questions[start : start + args.batch_size]
        pixels = [
            preprocess_image(p, model.config.vision.image_size, model.config.image_mode)
            for q in batch
            for p in q.pictures
        ]
        prompts, answers = (
            [encode_question(q, tokenizer, model.config) for q in batch],
            [tokenizer.encode(q.truth) + [tokenizer.eos_id] for q in batch],
        )
        (before, ids), (after, _) = (
            true_logits(m, prompts, answers, torch.stack(pixels) if pixels else None)
            for m in (plain, model)
        )
        off, centred = (
            x - x.mean(-1, keepdim=True) for x in (after - before, before)
        )  # a constant added to all changes nothing
        total["off"] += float(off.square().sum())
        total["size"] += float(centred.square().sum())
        before, after = before.log_softmax(-1), after.log_softmax(-1)
        total["n"] += len(ids)
        total["before"] -= float(before.gather(1, ids[:, None]).sum())
        total["after"] -= float(after.gather(1, ids[:, None]).sum())
        total["same"] += int((before.argmax(-1) == after.argmax(-1)).sum())
        total["kl"] += float((before.exp() * (before - after)).sum())
    n = total["n"]
    return {
        "bits": args.quantize,
        "dtype": str(next(plain.parameters()).dtype).removeprefix("torch."),
        "n": len(questions),
        "n_tokens": int(n),
        "perplexity_before": math.exp(total["before"] / n),
        "perplexity_after": math.exp(total["after"] / n),
        "logits_off": math.sqrt(total["off"] / total["size"]),
        "same_first": total["same"] / n,
        "kl": total["kl"] / n,
    }
