"""The tokenizer's half of a llava-hf folder: tokenizer.json where it can be trusted, or what makes
transformers ask sentencepiece, and the chat template."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from model_io.fast_tokenizer import first_difference, special_tokens, tokenizer_json
from model_io.pieces import PieceModel, read_pieces
from model_io.tokens import SYSTEM, Tokenizer
from qilin_min import IMAGE_TOKEN

# the one class of transformers, of 4.57 and 5 alike, that gives each text between control tokens to
# sentencepiece as it is; it wants the file under this name
SENTENCEPIECE_CLASS = "BertGenerationTokenizer"
SENTENCEPIECE_FILE = "spiece.model"


def chat_template(model: PieceModel) -> str:
    """build_prompt as a Jinja template, for messages as serve.py takes them: a turn's pictures in
    front, each with a newline; several texts of a message on lines of their own; a system message
    on a line above the first question, since what trained the model had our own sentence. <image>
    in a content that is one text is a picture, as in a data file. What no prompt of ours can hold
    is refused: control tokens in a text, empty messages, roles out of turn.
    """
    return filled_template("chat_template.jinja", model, control_pieces(model))


def control_pieces(model: PieceModel) -> list[str]:
    """The control tokens' texts."""
    return [model.pieces[i].text for i in sorted({model.unk_id, model.bos_id, model.eos_id})]


def filled_template(file: str, model: PieceModel, control: list[str]) -> str:
    """A Jinja template of this folder with what a tokenizer decides, and without its line ends and
    indents, which would stand in the prompt. control: what a text may not hold."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    template = "".join(line.strip() for line in text.splitlines())
    # where sentencepiece puts a blank in front of an answer, it stands in the text here
    blank = " " if model.has_dummy_prefix else ""
    template = template.replace("SYSTEM", SYSTEM.replace("'", "\\'"))
    template = template.replace("CONTROL_TOKENS", repr(control)).replace("BLANK", blank)
    return template.replace("\\n", "\n")


@dataclass(frozen=True)
class FastTokenizer:
    """What came of making a tokenizer.json."""

    content: dict | None
    obstacle: str | None  # why there is none


@lru_cache(maxsize=4)
def _fast_tokenizer(model_proto: bytes) -> FastTokenizer:
    """Made and compared once a process: some seconds for 50,000 pieces."""
    sp = SentencePieceProcessor(model_proto=model_proto)
    try:
        content = tokenizer_json(read_pieces(sp))
    except ValueError as error:
        return FastTokenizer(None, f"it has no form for {error}")
    text = first_difference(content, sp)
    if text is not None:
        return FastTokenizer(None, f"it would cut {text!r} otherwise than tokenizer.model does")
    return FastTokenizer(content, None)


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """A tokenizer.json that gives the ids of the tokenizer.model on every text that was tried, or
    what is in its way. It is what every transformers reads alike (given tokenizer.model alone,
    version 5 encodes what follows <image> and </s> differently)."""
    return _fast_tokenizer(tokenizer.sp.serialized_model_proto())


def tokenizer_jsons(tokenizer: Tokenizer | None) -> dict[str, dict]:
    """The tokenizer's JSON files of a folder: {file name: content}."""
    if tokenizer is None:
        return {}
    model = read_pieces(tokenizer.sp)
    unknown = model.pieces[model.unk_id].text
    special = {
        "bos_token": model.pieces[model.bos_id].text,
        "eos_token": model.pieces[model.eos_id].text,
        "unk_token": unknown,
        "pad_token": unknown,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **special,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_max_length": 2048,
    }
    files = {"tokenizer_config.json": tokenizer_config, "special_tokens_map.json": special}
    content = fast_tokenizer(tokenizer).content
    if content is None:
        tokenizer_config["tokenizer_class"] = SENTENCEPIECE_CLASS
        # transformers 5 takes the class by this name only where an auto_map stands beside it (and
        # follows that never, for a llava); else it makes a tokenizer.json of its own, in silence
        tokenizer_config["auto_map"] = {"AutoTokenizer": [SENTENCEPIECE_CLASS, None]}
        # or the class adds one of its own, past our ids
        tokenizer_config["sep_token"] = special["eos_token"]
        tokenizer_config["added_tokens_decoder"] = {
            str(token.pop("id")): token for token in special_tokens(model)
        }
    else:
        files["tokenizer.json"] = content
    return files


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What a folder holds of a tokenizer beside its JSON files, {file name: content}: the model as
    it was loaded, whatever became of its file since, and the chat template."""
    if tokenizer is None:
        return {}
    proto = tokenizer.sp.serialized_model_proto()
    template = chat_template(read_pieces(tokenizer.sp))
    files = {"tokenizer.model": proto, "chat_template.jinja": template.encode()}
    if fast_tokenizer(tokenizer).content is None:
        files[SENTENCEPIECE_FILE] = proto
    return files
