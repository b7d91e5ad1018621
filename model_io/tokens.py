"""A conversation -> input_ids and labels, and ids -> text in whole characters.

in: [{"from": "human", "value": "<image>\n…"}, {"from": "gpt", "value": "…"}]; out: input_ids and labels, lists of int of one length
"""

import sentencepiece

from common.files import model_folder
from qilin_min import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, generate

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = (
    "v1",
    "plain",
)  # v1: dialogs (paper, both stages; released stage 2). plain: picture, caption (released stage 1)
PICTURE, END = object(), object()  # what stands between two texts of a prompt


class BadDialog(ValueError):
    """What is wrong with a conversation; `kind` says it in a few words that can be counted."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class Tokenizer:
    """The sentencepiece model of a LLaMA folder. Never adds or recognises control ids in text: `</s>` typed by a person is four plain characters."""

    def __init__(self, path):
        """path: a model's folder, or a file: tokenizer.model, or weights that it lies beside. FileNotFoundError or ValueError names it."""
        path = model_folder(path)
        path = path.parent if path.suffix in (".safetensors", ".bin") else path
        self.path = path if path.is_file() else path / "tokenizer.model"
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no tokenizer: {self.path} does not exist (it comes with the LLaMA weights)"
            )
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError):
            raise ValueError(f"{self.path}: not a sentencepiece model") from None
        self.vocab_size, self.bos_id, self.eos_id = (
            self.sp.vocab_size(),
            self.sp.bos_id(),
            self.sp.eos_id(),
        )
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path}: a tokenizer without ids for begin and end of text")

    def encode(self, text, bos=False):
        try:
            return [self.bos_id] * bos + self.sp.encode(text)
        except RuntimeError:
            raise ValueError(f"not valid Unicode: {text[:40]!r}") from None

    def decode(self, ids):
        return self.sp.decode([i for i in ids if 0 <= i < self.vocab_size])

    def decode_stream(self, ids):
        """Text as it becomes certain, for an iterable of ids: a Chinese character may span several byte tokens and is held back until whole."""
        seen, shown = [], ""
        for i in ids:
            seen.append(i)
            text = self.decode(seen)
            # a cut character shows as up to 3 replacement marks; more than that is no character, and waiting would never end
            stable = text if len(text) - len(text.rstrip("\ufffd")) > 3 else text.rstrip("\ufffd")
            if len(stable) > len(shown):
                yield stable[len(shown) :]
                shown = stable
        if seen and len(self.decode(seen)) > len(shown):
            yield self.decode(seen)[len(shown) :]


def pictures_before(i, n_images):
    """How many pictures stand in front of turn i: n_images is an int (all in front of the first turn) or a list with a number a human turn."""
    if isinstance(n_images, list):
        return n_images[i // 2] if i % 2 == 0 and i // 2 < len(n_images) else 0
    return n_images if i == 0 else 0


def check_conversation(conversation: object, n_images: int | list[int] | None = None) -> None:
    """BadDialog unless it is a list of {"from", "value"} turns, human and gpt by turns, human first.

    n_images as in encode_conversation. Kinds: "no dialog", "question is empty", "answer is empty",
    "<image> in an answer".
    """
    if not isinstance(conversation, list) or not conversation:
        raise BadDialog("conversations is not a list of turns", "no dialog")
    for i, turn in enumerate(conversation):
        role = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadDialog(f"turn {i} is not an object with text under 'value'", "no dialog")
        if turn.get("from") != role:
            message = f"turn {i} is from {turn.get('from')!r}, expected {role!r}"
            raise BadDialog(message, "no dialog")
        # a picture alone may be a question
        if not turn["value"].strip() and not pictures_before(i, n_images):
            side = "question" if role == "human" else "answer"
            raise BadDialog(f"turn {i} is an empty {side}", f"{side} is empty")
        if role == "gpt" and n_images is None and IMAGE_TOKEN in turn["value"]:
            message = f"turn {i} is an answer that holds {IMAGE_TOKEN}"
            raise BadDialog(message, f"{IMAGE_TOKEN} in an answer")


def count_images(conversation):
    """Placeholders in a conversation of a data file: as many pictures belong to it."""
    return sum(turn["value"].count(IMAGE_TOKEN) for turn in conversation)


def build_prompt(conversation, template="v1", n_images=None):
    """The prompt as a list of (part, learn): part is a text, PICTURE or END (</s>); learn says whether the loss counts it.

    Texts are cut only where tokenising the whole released string would cut as well: at pictures, at </s>, and right after "ASSISTANT:".
    A turn's pictures move to its front, each followed by a newline. Source: released code, llava/conversation.py (v1, plain)
    and llava/train/train.py preprocess_multimodal; for n pictures n times what it does for one.
    """
    check_conversation(conversation, n_images)
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown: {' or '.join(TEMPLATES)}")
    if template == "plain":
        n = count_images(conversation[:1]) if n_images is None else pictures_before(0, n_images)
        if n == 0 or len(conversation) > 2:
            raise ValueError("template plain wants one turn with a picture and at most one answer")
        return [(PICTURE, False)] * n + [(turn["value"] + "\n", True) for turn in conversation[1:]]
    parts, text = [], SYSTEM + " "
    for i, turn in enumerate(conversation):
        value = turn["value"]
        if turn["from"] == "gpt":
            parts += [
                (value, True),
                (END, True),
            ]  # the blank after "ASSISTANT:" is the one that sentencepiece puts in front of every text
            continue
        n = value.count(IMAGE_TOKEN) if n_images is None else pictures_before(i, n_images)
        if n:
            value = (value.replace(IMAGE_TOKEN, "") if n_images is None else value).strip()
            value = "\n" + value if value else ""
        text += "USER: "
        for k in range(n):
            parts += [(text, False), (PICTURE, False)]
            text = "\n" if k < n - 1 else ""
        parts += [(text + value + " ASSISTANT:", False)]
        text = ""
    return parts


def _encode_parts(parts, tokenizer, n_image_tokens):
    ids, labels = [tokenizer.bos_id], [IGNORE_INDEX]
    for part, learn in parts:
        if part is PICTURE:
            piece = [IMAGE_TOKEN_INDEX] * n_image_tokens
        elif part is END:
            piece = [tokenizer.eos_id]
        else:
            piece = tokenizer.encode(part)
        ids += piece
        labels += piece if learn else [IGNORE_INDEX] * len(piece)
    return ids, labels


def encode_conversation(
    conversation, tokenizer, n_image_tokens, template="v1", max_length=2048, n_images=None
):
    """(input_ids, labels) of a dialog for training: lists of int of the same length, at most max_length tokens.

    n_images: None counts the <image> in the text (data files); an int puts that many pictures in front of the first turn, a list as many
    as it says in front of each human turn, and all text is taken literally. Too long: the end is cut, never a picture: where a picture would be cut both lists come back empty.
    ValueError when it is no conversation or ends with a question.
    """
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "gpt":
        raise ValueError("the conversation ends with a question: nothing to learn from")
    ids, labels = _encode_parts(
        build_prompt(conversation, template, n_images), tokenizer, n_image_tokens
    )
    if IMAGE_TOKEN_INDEX in ids[max_length:]:
        return [], []
    return ids[:max_length], labels[:max_length]


def encode_prompt(conversation, tokenizer, n_image_tokens, template="v1", n_images=None):
    """input_ids of a dialog that ends with a question: they end where the assistant starts to speak, exactly as in training."""
    check_conversation(conversation, n_images)
    if conversation[-1]["from"] != "human":
        raise ValueError("the conversation ends with an answer: nothing to ask")
    return _encode_parts(build_prompt(conversation, template, n_images), tokenizer, n_image_tokens)[
        0
    ]


class StreamedAnswer:
    """Iterate for the text of one prompt's answer, piece by piece and in whole characters. Afterwards, also after an interruption:
    ids (list of int without the end id), n_new (with it), finish_reason: "stop" (an end id or a stop text, which is not shown) or "length".

    stop: texts at which the answer ends. Other options as for generate(), one prompt.
    """

    def __init__(self, model, tokenizer, prompt, pixel_values=None, stop=(), **options):
        self.ids, self.n_new, self.finish_reason = [], 0, "length"
        self.interrupted = False  # set it, from any thread, to end the answer at the next token
        self._decode = tokenizer.decode
        self._text = self._until_stop(
            tokenizer.decode_stream(self._new_ids(model, prompt, pixel_values, options)), stop
        )

    def __iter__(self):
        return self._text

    def _new_ids(self, model, prompt, pixel_values, options):
        for (i,) in generate(model, [prompt], pixel_values, **options):
            self.n_new += 1
            if i in model.config.end_ids:
                self.finish_reason = "stop"
                return
            if self.interrupted:
                return
            self.ids.append(i)
            yield i

    def _until_stop(self, texts, stop):
        text, n_shown = "", 0  # text: not shown yet
        for piece in texts:
            text += piece
            found = min((at for s in stop if (at := text.find(s)) >= 0), default=-1)
            if found >= 0:
                self.finish_reason = "stop"
                while (
                    self.ids and len(self._decode(self.ids)) > n_shown + found
                ):  # a dialog must not go on from what nobody saw
                    self.ids.pop()
                yield text[:found]
                return
            n_held = max(
                (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
            )  # may become a stop text
            yield text[: len(text) - n_held]
            n_shown += len(text) - n_held
            text = text[len(text) - n_held :]
        yield text
