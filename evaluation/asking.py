"""Questions put to a model, with and without the picture; likelihoods of options and truths."""

import itertools

import torch

from common.text import CHOICES
from evaluation.answers import Likelihood, Said
from evaluation.testsets import Question
from model_io.beginnings import Beginnings
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import LOSS_CHUNK, KVCache, Qilin, QilinConfig, answer_ids, not_yet_held, pad_rows

# what precedes the options: the form of data_prep.py build --choices
CHOOSE = {
    "Chinese": CHOICES[0],
    "English": "Choose the right answer from the following options.",
}


@torch.no_grad()
def prefill(
    beginnings: Beginnings, prompts: list[list[int]], pixels: torch.Tensor | None, room: int
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """(cache, log-probabilities (B, V) of the first word, lengths (B,)): all prompts computed once,
    each picture once for all that begin with it, with room for more tokens."""
    model = beginnings.model
    device = next(model.parameters()).device
    cache = beginnings.cache_for(prompts, pixels, room)
    rest = not_yet_held(prompts, cache)
    n_new = torch.tensor([len(row) for row in rest], device=device)
    logits = model(pad_rows(rest, 0).to(device), cache=cache, lengths=n_new)  # (B, V)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return cache, logits.log_softmax(-1), lengths


@torch.no_grad()
def log_likelihoods(
    model: Qilin,
    cache: KVCache,
    first: torch.Tensor,
    lengths: torch.Tensor,
    answers: list[list[int]],
) -> list[Likelihood]:
    """How likely each row's answer (lists of int, one a row, each ending in </s>) is after its
    prompt; the cache is as before.

    What lies beyond the model's positions is not counted.
    """
    counted = []
    for answer, length in zip(answers, lengths, strict=True):
        room = cache.max_length - int(length)
        counted.append(answer[: max(1, room)])
    ids = pad_rows(counted, 0).to(first.device)  # (B, T)
    # the first word follows from the prompt
    found = [first.gather(1, ids[:, :1])]  # (B, 1)
    if ids.shape[1] > 1:
        hidden = model.model(model.model.embed_tokens(ids[:, :-1]), cache)  # (B, T - 1, C)
        # some positions at a time: their logits are (n, V)
        parts = []
        some_hidden = hidden.flatten(0, 1).split(LOSS_CHUNK)
        some_ids = ids[:, 1:].flatten().split(LOSS_CHUNK)
        for part, part_ids in zip(some_hidden, some_ids, strict=True):
            log_probs = model.logits(part).log_softmax(-1)
            parts.append(log_probs.gather(1, part_ids[:, None])[:, 0])
        found.append(torch.cat(parts).view(hidden.shape[:2]))  # (B, T - 1)
        cache.truncate(lengths)
    log_probs = torch.cat(found, 1).cpu()  # (B, T)
    likelihoods = []
    for row, answer in zip(log_probs, counted, strict=True):
        total = float(row[: len(answer)].sum())
        likelihoods.append(Likelihood(round(total, 4), len(answer)))
    return likelihoods


def with_options(question: Question) -> str:
    """The question with its options listed, as data_prep.py build --choices writes it."""
    options = [f"{letter}. {text}" for letter, text in question.choices.items()]
    return "\n".join([question.question, CHOOSE[question.language], *options])


def encode_question(
    question: Question, tokenizer: Tokenizer, config: QilinConfig, options: bool = False
) -> list[int]:
    conversation = question.conversation
    if options:
        last = {"from": "human", "value": with_options(question)}
        conversation = [*conversation[:-1], last]
    return encode_prompt(conversation, tokenizer, config.n_image_tokens, n_images=question.n_images)


def ask_batch(
    beginnings: Beginnings,
    tokenizer: Tokenizer,
    batch: list[Question],
    pixels: torch.Tensor | None,
    max_new_tokens: int,
) -> list[Said]:
    """What the model says to a batch of questions: the open answer, the likelihood of the truth and
    of each option, the answer when options are shown. beginnings: of this model."""
    model = beginnings.model
    prompts = [encode_question(question, tokenizer, model.config) for question in batch]
    candidates = [encode_candidates(question, tokenizer) for question in batch]
    longest = max(len(candidate) for candidate in itertools.chain.from_iterable(candidates))
    cache, first, lengths = prefill(beginnings, prompts, pixels, max(max_new_tokens, longest))

    # each candidate of a row scored in turn on the same keys and values
    likelihoods: list[list[Likelihood]] = [[] for _ in batch]
    for k in range(max(map(len, candidates))):
        # a row that has fewer has its end scored, which is not kept
        turn = [row[k] if k < len(row) else [tokenizer.eos_id] for row in candidates]
        scored = log_likelihoods(model, cache, first, lengths, turn)
        for found, row, likelihood in zip(likelihoods, candidates, scored, strict=True):
            if k < len(row):
                found.append(likelihood)

    # the last token of each prompt is run once more, for its logits
    cache.truncate(lengths - 1)
    ids = answer_ids(model, prompts, cache=cache, max_new_tokens=max_new_tokens)
    answers = [tokenizer.decode(row) for row in ids]
    choice_answers = ask_with_options(beginnings, tokenizer, batch, pixels, max_new_tokens)

    said = []
    for i, (question, answer) in enumerate(zip(batch, answers, strict=True)):
        likelihood_of = dict(zip(candidate_texts(question), likelihoods[i], strict=True))
        options = [likelihood_of[text] for text in question.choices.values()]
        said.append(Said(answer, likelihood_of[question.truth], options, choice_answers.get(i, "")))
    return said


def candidate_texts(question: Question) -> list[str]:
    """What is scored: the truth and the options, of which the truth mostly is one."""
    return list(dict.fromkeys([question.truth, *question.choices.values()]))


def encode_candidates(question: Question, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each text that is scored, with its end."""
    return [tokenizer.encode(text) + [tokenizer.eos_id] for text in candidate_texts(question)]


def ask_with_options(
    beginnings: Beginnings,
    tokenizer: Tokenizer,
    batch: list[Question],
    pixels: torch.Tensor | None,
    max_new_tokens: int,
) -> dict[int, str]:
    """{place in the batch: answer} of the questions that have options, which are shown."""
    model = beginnings.model
    places = []
    prompts = []
    pictures = []  # places of their pictures among those of the batch
    n_pictures = 0
    for i, question in enumerate(batch):
        start = n_pictures
        n_pictures += len(question.pictures)
        if question.choices:
            places.append(i)
            prompts.append(encode_question(question, tokenizer, model.config, options=True))
            pictures += range(start, n_pictures)
    if not places:
        return {}
    own = pixels[pictures] if pixels is not None and pictures else None
    cache = beginnings.cache_for(prompts, own, max_new_tokens)
    ids = answer_ids(model, prompts, cache=cache, max_new_tokens=max_new_tokens)
    return {i: tokenizer.decode(row) for i, row in zip(places, ids, strict=True)}
