"""A sentencepiece model -> the vocabulary and the chat template of a GGUF file.

What llama.cpp would read otherwise is refused: it merges pieces by score, leftmost first, spells in
bytes what no piece holds, and changes nothing of a text but for a blank in front.
"""

from pathlib import Path
from typing import Any

from model_io.pieces import PieceKind, PieceModel, PieceModelKind, read_pieces
from model_io.tokenizer_files import control_pieces, filled_template
from model_io.tokens import SYSTEM, Tokenizer

# --- 1. what llama.cpp reads as sentencepiece does ------------------------------------------------


def check_vocabulary(tokenizer: Tokenizer) -> None:
    """ValueError for a sentencepiece model in which llama.cpp would find other ids."""
    model = read_pieces(tokenizer.sp)
    differences = {
        "it is no BPE": model.kind != PieceModelKind.BPE,
        "it has no pieces for all 256 bytes": len(model.ids_of(PieceKind.BYTE)) != 256,
        "it changes characters before it looks for pieces": model.has_charsmap,
        "it drops blanks": model.is_trimmed,
        "it writes blanks behind words": model.has_blank_behind,
        "it has pieces defined by hand": bool(model.ids_of(PieceKind.USER_DEFINED)),
        "it has unused pieces": bool(model.ids_of(PieceKind.UNUSED)),
    }
    for reason, is_so in differences.items():
        if is_so:
            raise ValueError(
                f"{tokenizer.path}: llama.cpp would read texts otherwise ({reason}), so there is "
                "no GGUF of this model"
            )


# --- 2. what stands in the file -------------------------------------------------------------------


def control_name(piece: str) -> str:
    """What a control piece is called in the file.

    llama.cpp takes a control piece's name for its id wherever it stands in a prompt: `</s>` typed
    by a person would end the dialog. Nobody types these.
    """
    return f"<|{piece}|>"


def other_ends(tokenizer: Tokenizer, end_ids: list[int]) -> list[int]:
    """The ids beside the tokenizer's own in which an answer may end, of those that are ever said:
    at most two, which llama.cpp calls end of turn and end of message. ValueError for more."""
    others = [i for i in end_ids if i != tokenizer.eos_id and i < tokenizer.vocab_size]
    if len(others) > 2:
        raise ValueError(
            f"llama.cpp has places for 3 ids that end an answer, this model has {1 + len(others)} "
            f"({tokenizer.eos_id}, {', '.join(map(str, others))})"
        )
    return others


def end_of_text(tokenizer: Tokenizer) -> str:
    """What the end id is called in the file."""
    return control_name(tokenizer.sp.id_to_piece(tokenizer.eos_id))


def add_vocabulary(writer: Any, tokenizer: Tokenizer, end_ids: list[int]) -> None:
    """Pieces, scores, types and special ids, for a gguf.GGUFWriter."""
    model = read_pieces(tokenizer.sp)
    controls = {*model.ids_of(PieceKind.CONTROL, PieceKind.UNKNOWN)}
    names = [
        control_name(piece.text) if i in controls else piece.text
        for i, piece in enumerate(model.pieces)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([piece.score for piece in model.pieces])
    # llama.cpp's numbers of the kinds are sentencepiece's
    writer.add_token_types([int(piece.kind) for piece in model.pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(model.unk_id)
    writer.add_pad_token_id(model.unk_id)
    others = other_ends(tokenizer, end_ids)
    if len(others) > 0:
        writer.add_eot_token_id(others[0])
    if len(others) > 1:
        writer.add_eom_token_id(others[1])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.has_dummy_prefix)
    writer.add_chat_template(llama_cpp_template(model))


def llama_cpp_template(model: PieceModel) -> str:
    """tokenizer_files.chat_template for llama.cpp, which joins a message's texts and pictures to
    one text before, each picture a marker <__media_…__>, and puts the begin id in front itself."""
    control = [control_name(piece) for piece in control_pieces(model)]
    return filled_template("chat_template_llama_cpp.jinja", model, control)


def modelfile(text_file: str, mmproj_file: str, tokenizer: Tokenizer) -> str:
    """What `ollama create` reads. ollama puts a picture in front of its question without the
    newline that training had: a question that begins with one has it."""
    end = end_of_text(tokenizer)
    template = Path(__file__).with_name("ollama_template.txt").read_text(encoding="utf-8")
    template = template.strip().replace("SYSTEM", SYSTEM).replace("END", end)
    return (
        f"FROM ./{text_file}\n"
        f"FROM ./{mmproj_file}\n"
        f'TEMPLATE """{template}"""\n'
        f'PARAMETER stop "{end}"\n'
        "PARAMETER temperature 0\n"
    )
