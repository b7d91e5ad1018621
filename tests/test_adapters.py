"""Promise: a peft adapter is merged into its base as peft merges it, tensor by tensor, whatever it
changes and however it is loaded; what cannot be merged is refused by name.
"""

import os
import random
import shutil

import pytest
import torch
from conftest import edit_json, hf_clip, hf_llama, in_process, make_qilin, run
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import convert
import qilin_min as q
import sample
from evaluation.systems import FolderOptions, folder_system
from model_io.adapters import open_adapter
from model_io.export import save_qilin
from model_io.load import load_qilin, read_checkpoint

# the base's linear layers that an adapter may change, by how their names end
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["out_proj", "fc1", "fc2"]
PROJECTOR = ["linear_1", "linear_2"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    """A llava-hf folder of either dtype."""
    folder = tmp_path_factory.mktemp("base") / request.param
    save_qilin(make_qilin(), None, folder, getattr(torch, request.param))
    return folder


def open_hf(folder, dtype):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def randomise_adapter(model, seed):
    """An adapter as training leaves it: nothing at its start, nothing small."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "lora_magnitude" in name:
            param.data = param.data * (1 + 0.1 * noise)
        elif "lora_" in name:
            param.data = 0.2 * noise
        elif "modules_to_save" in name:
            param.data = (0.1 * noise).to(param.dtype)


def write_adapter(base, folder, seed=0, **settings):
    """An adapter of a llava-hf folder, saved by peft; -> its folder."""
    model = open_hf(base, torch.float32)
    model = get_peft_model(model, LoraConfig(**settings))
    randomise_adapter(model, seed)
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def merged_by_peft(base, adapter, dtype):
    """{our name: tensor} of peft's merge_and_unload."""
    model = PeftModel.from_pretrained(open_hf(base, dtype), adapter)
    merged = model.merge_and_unload().state_dict()
    return {q.our_name(name): tensor for name, tensor in merged.items()}


def worst_difference(model, want):
    """The largest difference of a model's weights from a merge by peft, against the largest weight
    of the tensor."""
    worst = 0.0
    for name, param in model.named_parameters():
        name = name.replace("mm_projector.0.", "mm_projector.linear_1.")
        tensor = want[name.replace("mm_projector.2.", "mm_projector.linear_2.")]
        assert tensor.dtype == param.dtype, name
        difference = (param.detach().float() - tensor.detach().float()).abs().max()
        worst = max(worst, float(difference / tensor.detach().float().abs().max()))
    return worst


def drawn_settings(seed):
    """Settings that peft takes, drawn by a seed."""
    draw = random.Random(seed)
    n_targets = draw.randint(1, 5)
    settings = dict(
        r=draw.randint(1, 9),
        lora_alpha=draw.choice([1, 3, 8, 32]),
        target_modules=draw.sample(LANGUAGE + TOWER + PROJECTOR, n_targets),
        use_rslora=draw.random() < 0.5,
        use_dora=draw.random() < 0.3,
    )
    target = draw.choice(settings["target_modules"])
    if draw.random() < 0.5:
        settings["rank_pattern"] = {target: draw.randint(1, 12)}
    if draw.random() < 0.5:
        settings["alpha_pattern"] = {rf"layers\.1\..*\.{target}": 7}
    if not set(PROJECTOR) & set(settings["target_modules"]) and draw.random() < 0.5:
        settings["modules_to_save"] = ["multi_modal_projector"]
    return settings


def check_merge(base, adapter, report, what):
    """Every weight is peft's: one step of bfloat16 is 2 ** -8 of a number."""
    dtype = getattr(torch, base.name)
    ours = load_qilin(adapter, dtype=dtype)
    want = merged_by_peft(base, adapter, dtype)
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    report(f"adapter, {what}, {base.name}", worst_difference(ours, want), limit)
    before = load_qilin(base, dtype=dtype)
    assert any(not torch.equal(p, before.get_parameter(n)) for n, p in ours.named_parameters())


@pytest.mark.parametrize("seed", range(4))
def test_merged_weights_are_pefts(base, tmp_path, report, seed):
    settings = drawn_settings(seed)
    adapter = write_adapter(base, tmp_path / "adapter", seed, **settings)
    check_merge(base, adapter, report, settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=3, lora_alpha=7, target_modules=LANGUAGE + TOWER + PROJECTOR, use_dora=True),
        dict(r=3, lora_alpha=7, target_modules=[*TOWER, *PROJECTOR], lora_bias=True),
        dict(r=2, target_modules=["fc1", "linear_1"], bias="all"),
        dict(r=2, target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        dict(r=2, target_modules=["lm_head", "q_proj"], fan_in_fan_out=True),
    ],
    ids=["every layer, DoRA", "biases of B", "biases of the base", "vocabulary", "head"],
)
def test_what_peft_can_ask_for(base, tmp_path, report, settings):
    adapter = write_adapter(base, tmp_path / "adapter", **settings)
    check_merge(base, adapter, report, settings)


def test_names_of_older_releases(base, tmp_path):
    """Adapters of transformers up to 4.51, and of older peft, hold the same numbers under other
    names."""
    settings = dict(
        r=2,
        target_modules=["q_proj", "fc1"],
        use_dora=True,
        modules_to_save=["multi_modal_projector"],
    )
    new = write_adapter(base, tmp_path / "new", **settings)
    old = tmp_path / "old"
    shutil.copytree(new, old)
    tensors = {}
    for name, tensor in load_file(new / "adapter_model.safetensors").items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        name = name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        name = name.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
        name = name.replace("linear_1.weight", "modules_to_save.linear_1.weight")
        name = name.replace("lora_A.weight", "lora_A.default.weight")
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
        tensors[name] = tensor
    assert not tensors.keys() <= load_file(new / "adapter_model.safetensors").keys()
    save_file(tensors, old / "adapter_model.safetensors")
    want = load_qilin(new).state_dict()
    got = load_qilin(old).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(base, adapter), not to be changed."""
    folder = tmp_path_factory.mktemp("plain")
    save_qilin(make_qilin(), None, folder / "base")
    adapter = write_adapter(folder / "base", folder / "adapter", r=2, target_modules=["q_proj"])
    return folder / "base", adapter


# --- as LLaVA's own LoRA training leaves it -------------------------------------------------------


@pytest.fixture
def llava_lora(tmp_path, llama_folder, clip_folder):
    """(adapter, the weights that it stands for): pickled, the projector beside it, the base a
    LLaMA, the tower named by a path; both are found beside it."""
    shutil.copytree(llama_folder, tmp_path / "vicuna-13b-v1.5")
    shutil.copytree(clip_folder, tmp_path / "clip-vit-large-patch14-336")
    adapter = tmp_path / "llava-lora"
    llama = get_peft_model(hf_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE))
    randomise_adapter(llama, seed=0)
    llama.save_pretrained(adapter, safe_serialization=False)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-13b-v1.5")
    shutil.copy(llama_folder / "config.json", adapter / "config.json")
    edit_json(
        adapter / "config.json",
        model_type="llava",
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="pad",
    )
    generator = torch.Generator().manual_seed(1)
    projector = {
        "0.weight": torch.randn(64, 64, generator=generator),
        "0.bias": torch.randn(64, generator=generator),
        "2.weight": torch.randn(64, 64, generator=generator),
        "2.bias": torch.randn(64, generator=generator),
    }
    pickled = {f"base_model.model.model.mm_projector.{n}": t for n, t in projector.items()}
    torch.save(pickled, adapter / "non_lora_trainables.bin")
    want = {}
    for name, tensor in llama.merge_and_unload().state_dict().items():
        want[name] = tensor
    for name, tensor in hf_clip().state_dict().items():
        want[q.our_name(name)] = tensor
    for name, tensor in projector.items():
        layer = "linear_1" if name.startswith("0") else "linear_2"
        want[f"mm_projector.{layer}.{name[2:]}"] = tensor
    return adapter, want


def test_llavas_own(llava_lora, report):
    adapter, want = llava_lora
    model = load_qilin(adapter)
    report("adapter of LLaVA's training", worst_difference(model, want), 1e-6)
    assert model.config.projector_type == "mlp2x_gelu"


def test_nothing_that_is_read_is_written_over(llava_lora, tmp_path):
    """Folders that hold a config.json, as an export's that may be replaced does: the adapter's,
    named by its file, the base and the tower, found by their names."""
    adapter, _ = llava_lora
    file = adapter / "adapter_model.bin"
    for name in ("llava-lora", "vicuna-13b-v1.5", "clip-vit-large-patch14-336"):
        before = sorted((tmp_path / name).iterdir())
        done = in_process(convert.main, file, tmp_path / name, code=2)
        assert "is a source as well" in done.stderr
        assert sorted((tmp_path / name).iterdir()) == before


def test_pictures_as_the_adapter_was_trained(llava_lora, plain):
    """config.json beside an adapter, or its processor's files, go before what its base says."""
    adapter, _ = llava_lora
    base, of_hf = plain
    assert load_qilin(adapter).config.image_mode == "pad"
    # what LLaVA's code does where nothing is said
    edit_json(adapter / "config.json", image_aspect_ratio=None)
    assert load_qilin(adapter).config.image_mode == "crop"
    cropped = adapter.with_name("cropped")
    shutil.copytree(of_hf, cropped)
    assert load_qilin(cropped).config.image_mode == "pad"
    shutil.copy(base / "preprocessor_config.json", cropped)
    crop = dict(do_pad=False, do_center_crop=True, size={"shortest_edge": 56})
    edit_json(cropped / "preprocessor_config.json", **crop)
    assert load_qilin(cropped).config.image_mode == "crop"


def test_a_base_given(llava_lora, llama_folder, tmp_path, report):
    """Where the named one is nowhere, --base or --llm gives it; so does a whole model, whose own
    projector the adapter's replaces."""
    adapter, want = llava_lora
    whole = tmp_path / "whole"
    save_qilin(
        load_qilin(llm=llama_folder, vision=tmp_path / "clip-vit-large-patch14-336"), None, whole
    )
    shutil.rmtree(tmp_path / "vicuna-13b-v1.5")
    done = in_process(convert.main, adapter, tmp_path / "out", code=2)
    assert "'lmsys/vicuna-13b-v1.5'" in done.stderr and "--base DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    for given in (dict(base=llama_folder), dict(llm=llama_folder), dict(base=whole)):
        model = load_qilin(adapter, **given)
        rows = len(want[q.EMBED])
        for name in (q.EMBED, q.HEAD):
            param = model.get_parameter(name)
            # a whole model's vocabulary is padded
            param.data = param.data[:rows]
        report(f"adapter with {[*given]}", worst_difference(model, want), 1e-6)


def test_another_projector_takes_the_place_of_the_adapters(llava_lora, tmp_path):
    adapter, want = llava_lora
    file = tmp_path / "projector.safetensors"
    save_file(
        {
            "model.mm_projector.weight": torch.ones(64, 64),
            "model.mm_projector.bias": torch.ones(64),
        },
        file,
    )
    model = load_qilin(adapter, projector=file)
    assert torch.equal(model.mm_projector.weight, torch.ones(64, 64))
    checkpoint = read_checkpoint(adapter, projector=file)
    line = q.account(q.Qilin(checkpoint.config), checkpoint.sources)[1]
    assert "4 skipped (part given elsewhere)" in line
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(model.get_parameter(name), want[name], atol=1e-6)


# --- however it is loaded -------------------------------------------------------------------------


def test_rows_are_cut_as_ranks_read_them(base, tmp_path):
    """A rank reads its rows alone: of a weight, of DoRA's, of a bias."""
    adapter = write_adapter(
        base, tmp_path / "adapter", r=3, target_modules=["fc1", "linear_1"], lora_bias=True
    )
    dora = write_adapter(base, tmp_path / "dora", r=3, target_modules=["fc1"], use_dora=True)
    for folder in (adapter, dora):
        ((files, _),) = read_checkpoint(folder).sources
        for name in open_adapter(folder).changes:
            for each in (name, name.removesuffix("weight") + "bias"):
                n = files.shape(each)[0]
                some = [files.rows(each, start, min(n, start + 7)) for start in range(0, n, 7)]
                assert torch.allclose(torch.cat(some), files.rows(each), atol=1e-6), each


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_merged_before_it_is_quantised(base, tmp_path, quantize):
    """The same bits as of the converted model; the base's alone are others."""
    adapter = write_adapter(base, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=LANGUAGE)
    in_process(convert.main, adapter, tmp_path / "merged", "--dtype", "float32", code=0)
    got = load_qilin(adapter, quantize=quantize).state_dict()
    want = load_qilin(tmp_path / "merged", quantize=quantize).state_dict()
    alone = load_qilin(base, quantize=quantize).state_dict()
    quantised = [name for name in want if want[name].dtype == torch.int8]
    assert len(quantised) == 14
    for name in quantised:
        assert torch.equal(got[name], want[name])
        assert not torch.equal(got[name], alone[name])


def test_convert_merges_in_the_bases_dtype(base, tmp_path, report):
    """A file of the base's dtype, the weights that peft's own merge saves; base and adapter stay as
    they are, and neither is written over."""
    adapter = write_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj", "linear_2"])
    before = (base / "model.safetensors").read_bytes()
    in_process(convert.main, adapter, tmp_path / "merged", code=0)
    dtype = getattr(torch, base.name)
    assert load_file(tmp_path / "merged/model.safetensors").popitem()[1].dtype == dtype
    model = load_qilin(tmp_path / "merged", dtype=dtype)
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    difference = worst_difference(model, merged_by_peft(base, adapter, dtype))
    report(f"adapter, converted, {base.name}", difference, limit)
    for target in (base, adapter):
        assert in_process(convert.main, adapter, target).returncode == 2
    assert (base / "model.safetensors").read_bytes() == before
    assert (adapter / "adapter_model.safetensors").is_file()


def test_every_command_takes_it(toy, toy_model, tmp_path):
    """sample.py and evaluate.py compare, by the folder or by its file, with the tokenizer of its
    base; training goes on from it."""
    adapter = write_adapter(toy_model, tmp_path / "adapter", r=4, target_modules=LANGUAGE)
    in_process(convert.main, adapter, tmp_path / "merged", code=0)
    asked = ("图中有什么？", "--device", "cpu", "--max-new-tokens", 8, "--model")
    answers = []
    for model in (tmp_path / "merged", adapter, adapter / "adapter_model.safetensors"):
        answers.append(in_process(sample.main, *asked, model, code=0).stdout)
    assert answers[0] == answers[1] == answers[2] and answers[0].strip()
    assert in_process(sample.main, *asked, toy_model, code=0).stdout != answers[0]
    options = FolderOptions(device="cpu", dtype=None, quantize=None, batch_size=1, max_new_tokens=1)
    # what the answers depend on: the base's files as well
    before = folder_system("ours", str(adapter), options).settings
    os.utime(toy_model / "model.safetensors")
    assert folder_system("ours", str(adapter), options).settings != before


@pytest.mark.skipif(not os.environ.get("LONG"), reason="--long")
def test_training_goes_on_from_it(toy, toy_model, tmp_path, report):
    """The first loss is that of the merged model; on two ranks, each of which merges its rows."""
    adapter = write_adapter(toy_model, tmp_path / "adapter", r=4, target_modules=LANGUAGE)
    in_process(convert.main, adapter, tmp_path / "merged", code=0)
    losses = []
    # the tower has layers of the same names, which the adapter changes as well
    merged = ("--llm", tmp_path / "merged", "--vision", tmp_path / "merged")
    changed = ("--llm", toy_model, "--model", adapter)
    for model, ranks in ((merged, 1), (changed, 2)):
        options = (*model, "--max-steps", 1, "--batch-size", 4)
        losses.append(run(toy, tmp_path / f"out{ranks}", *options, ranks=ranks)[0][0])
    report("adapter, first loss of a training on it", abs(losses[0] - losses[1]), 1e-5)


def test_info_tells_what_it_is(base, tmp_path):
    adapter = write_adapter(
        base,
        tmp_path / "adapter",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "fc1"],
        modules_to_save=["multi_modal_projector"],
    )
    text = in_process(convert.main, "info", adapter, code=0).stdout
    # q_proj of 2 blocks of the language model, q_proj and fc1 of 3 of the tower
    assert (
        "8 layers: fc1, q_proj" in text and "rank        4;" in text and "scale       1.5" in text
    )
    # (64 + 64) * 2 + (48 + 48) * 3 + (48 + 80) * 3 numbers a rank
    assert f"{4 * (256 + 288 + 384):,} parameters" in text
    assert "4 tensors: mm_projector.linear_1.bias" in text and str(base) in text
    assert "none missing, none left over" in text
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/nowhere")
    text = in_process(convert.main, "info", adapter, code=0).stdout
    assert "org/nowhere: not found, give --base DIR" in text
    text = in_process(convert.main, "info", adapter, "--base", base, code=0).stdout
    assert "none missing, none left over" in text


# --- what cannot be merged ------------------------------------------------------------------------


LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def with_tensors(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(peft_type="IA3"), "peft_type 'IA3'"),
        (dict(peft_type=None), "peft_type None"),
        (dict(use_qalora=True), "use_qalora = True"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(use_dora=True), "lora_magnitude_vector"),
        (dict(lora_bias=True), "lora_B.bias"),
        (dict(r=3), "adapter_config.json says 3"),
        (dict(lora_alpha="much"), "lora_alpha = 'much'"),
        (dict(alpha_pattern={"(": 1}), "'('"),
        (dict(something_of_next_year=4), "something_of_next_year = 4"),
        (dict(base_model_name_or_path=None), "names no base: give --base DIR"),
        (dict(base_model_name_or_path="org/nowhere"), "give --base DIR"),
    ],
)
def test_settings_that_are_refused(plain, tmp_path, settings, words):
    adapter = tmp_path / "adapter"
    shutil.copytree(plain[1], adapter)
    edit_json(adapter / "adapter_config.json", **settings)
    check_refused(adapter, tmp_path, words)


def check_refused(adapter, tmp_path, words):
    done = in_process(convert.main, adapter, tmp_path / "out", code=2)
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert "adapter" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), f"{LAYER}.lora_B.weight"),
        (lambda t: t.update({f"{LAYER}.lora_B.bias": torch.ones(64)}), "lora_B.bias"),
        (lambda t: t.update({f"{LAYER}.lora_embedding_A": torch.ones(2)}), "lora_embedding_A"),
        (lambda t: t.update({"something.else": torch.ones(2)}), "something.else"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2, 63)}), "(64, 63)"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2)}), "no linear layer"),
        (lambda t: t[f"{LAYER}.lora_B.weight"].fill_(torch.nan), "not finite"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2, 64).long()}), "int64"),
        (
            lambda t: t.update(
                {
                    k.replace("layers.0", "layers.9"): v.clone()
                    for k, v in t.items()
                    if "layers.0" in k
                }
            ),
            "model.layers.9.self_attn.q_proj.weight",
        ),
    ],
)
def test_tensors_that_are_refused(plain, tmp_path, change, words):
    adapter = tmp_path / "adapter"
    shutil.copytree(plain[1], adapter)
    with_tensors(adapter, change)
    check_refused(adapter, tmp_path, words)


def test_folders_that_are_refused(plain, tmp_path, clip_folder):
    base, good = plain
    adapter = tmp_path / "adapter"
    shutil.copytree(good, adapter)
    shutil.copy(base / "model.safetensors", adapter)
    check_refused(adapter, tmp_path, "holds an adapter and weights of its own (model.safetensors)")
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    check_refused(adapter, tmp_path, "adapter_model.bin")
    (adapter / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    check_refused(adapter, tmp_path, "adapter_config.json is a Git LFS pointer")
    for options in (("--llm", good), ("--base", good)):
        done = in_process(convert.main, good, tmp_path / "out", *options, code=2)
        assert f"{good} is an adapter" in done.stderr
    done = in_process(convert.main, base, tmp_path / "out", "--base", base, code=2)
    assert "--base" in done.stderr and "is none" in done.stderr
    # one that it names is looked at as well
    shutil.copytree(good, tmp_path / "first")
    shutil.copy(base / "config.json", tmp_path / "first")
    shutil.copytree(good, tmp_path / "second")
    edit_json(tmp_path / "second/adapter_config.json", base_model_name_or_path="org/first")
    check_refused(tmp_path / "second", tmp_path, "first is an adapter itself")
    # vision towers have no blocks of a language model
    done = in_process(convert.main, good, tmp_path / "out", "--base", clip_folder, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_kind_of_adapter(plain, tmp_path):
    """As peft itself writes it."""
    model = get_peft_model(
        open_hf(plain[0], torch.float32),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    )
    model.save_pretrained(tmp_path / "adapter")
    check_refused(tmp_path / "adapter", tmp_path, "'IA3'")
