"""Questions put to a model, with and without the picture; likelihoods of options and truths."""

import numpy as np
import torch

from common.text import CHOICES
from model_io.tokens import encode_prompt
from qilin_min import KVCache, answer_ids, pad_rows

CHOOSE = {
    "Chinese": CHOICES[0],
    "English": "Choose the right answer from the following options.",
}  # what precedes the options: the form of data_prep.py build --choices


@torch.no_grad()
def prefill(model, prompts, pixels, room):
    """(cache, log-probabilities (B, V) of the first word, lengths (B,)): all prompts and pictures computed once, with room for more tokens."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    limit = model.config.text.max_position_embeddings
    cache = KVCache(model.config.text.num_hidden_layers, min(int(lengths.max()) + room, limit))
    logits = model(
        pad_rows(prompts, 0).to(device),
        None if pixels is None else pixels.to(device),
        cache=cache,
        lengths=lengths,
    )  # (B, V)
    return cache, logits.log_softmax(-1), lengths


@torch.no_grad()
def log_likelihoods(model, cache, first, lengths, answers):
    """Sum of log-probabilities of each row's answer (lists of int, one a row, each ending in </s>) after its prompt; the cache is as before.

    What lies beyond the model's positions is not counted: -> (sums, numbers of tokens counted).
    """
    room = [min(len(a), cache.max_length - int(n)) for a, n in zip(answers, lengths)]
    answers = [a[: max(1, n)] for a, n in zip(answers, room)]
    ids = pad_rows(answers, 0).to(first.device)  # (B, T)
    found = [first.gather(1, ids[:, :1])]  # the first word follows from the prompt
    if ids.shape[1] > 1:
        hidden = model.model(model.model.embed_tokens(ids[:, :-1]), cache)  # (B, T - 1, C)
        found.append(
            torch.stack(
                [
                    model.logits(h).log_softmax(-1).gather(1, i[1:, None])[:, 0]
                    for h, i in zip(hidden, ids)
                ]
            )
        )  # a row at a time: (T - 1, V)
        cache.truncate(lengths)
    found = torch.cat(found, 1).cpu()  # (B, T)
    return [float(row[: len(a)].sum()) for row, a in zip(found, answers)], [len(a) for a in answers]


def with_options(question):
    """The question with its options listed, as data_prep.py build --choices writes it."""
    return "\n".join(
        [
            question.question,
            CHOOSE[question.language],
            *(f"{letter}. {text}" for letter, text in question.choices.items()),
        ]
    )


def encode_question(question, tokenizer, config, options=False):
    conversation = (
        [*question.conversation[:-1], {"from": "human", "value": with_options(question)}]
        if options
        else question.conversation
    )
    return encode_prompt(conversation, tokenizer, config.n_image_tokens, n_images=question.n_images)


def ask(model, tokenizer, batch, pixels, max_new_tokens):
    """What the model says to a batch of questions, one dict each: the open answer, the likelihood of the truth and of each option, the answer when options are shown."""
    config = model.config
    prompts = [encode_question(question, tokenizer, config) for question in batch]
    # each candidate of a row scored in turn on the same keys and values: the truth, then its options
    texts = [[question.truth, *question.choices.values()] for question in batch]
    candidates = [[tokenizer.encode(text) + [tokenizer.eos_id] for text in row] for row in texts]
    cache, first, lengths = prefill(
        model, prompts, pixels, max(max_new_tokens, *(len(c) for row in candidates for c in row))
    )
    said = [{"likelihood": []} for _ in batch]
    for k in range(max(map(len, candidates))):
        for row, total, n in zip(
            said,
            *log_likelihoods(
                model,
                cache,
                first,
                lengths,
                [row[k] if k < len(row) else [tokenizer.eos_id] for row in candidates],
            ),
        ):
            row["likelihood"].append([round(total, 4), n])
    cache.truncate(lengths - 1)  # the last token of each prompt is run once more, for its logits
    for row, ids, question in zip(
        said, answer_ids(model, prompts, cache=cache, max_new_tokens=max_new_tokens), batch
    ):
        row["answer"] = tokenizer.decode(ids)
        row["likelihood"] = row["likelihood"][: 1 + len(question.choices)]
    places = [i for i, question in enumerate(batch) if question.choices]
    if places:
        starts = np.cumsum([0, *(len(question.pictures) for question in batch)])
        mine = [p for i in places for p in range(starts[i], starts[i + 1])]
        prompts = [encode_question(batch[i], tokenizer, config, options=True) for i in places]
        for i, ids in zip(
            places,
            answer_ids(
                model, prompts, pixels[mine] if mine else None, max_new_tokens=max_new_tokens
            ),
        ):
            said[i]["choice_answer"] = tokenizer.decode(ids)
    return said
