"""What Meta's format has no place for comes back: every file of a tokenizer, every key of a configuration."""

import json
import shutil

import pytest
from checkpoints import SMALL_VOCAB, hf_model, params, small_tokenizer, write_meta
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.tokenizer.rows import read_tokens
from hf_llama3.errors import UserError
from hf_llama3.files.hashes import CHECKLIST, CHECKSUMS, check_sums

TURNS = [{"role": "user", "content": "abc"}]
TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer of Llama 3's kind, and two rows for tokens that are added to it."""
    write_meta(tmp_path / "made", params(vocab=SMALL_VOCAB + 2), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "made", tmp_path / "hf")
    return tmp_path / "hf"


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def settings(folder, **values):
    edit(folder / "tokenizer_config.json", lambda config: config.update(values))


def add_tokens(folder):
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([AddedToken("<call>", normalized=False), AddedToken("<pad>", lstrip=True, rstrip=True)])
    fast.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))


def pad_on_the_left(folder):
    settings(folder, pad_token="<|reserved_special_token_1|>", padding_side="left", truncation_side="left")
    settings(folder, model_max_length=77, clean_up_tokenization_spaces=True)


def without_begin(folder):
    edit(folder / "tokenizer.json", lambda content: content.update(post_processor=None))


def templates_in_a_list(folder):
    named = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    settings(folder, chat_template=[{"name": name, "template": text} for name, text in named.items()])


def templates_in_files(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents " + TEMPLATE)


def names_in_a_map(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<|reserved_special_token_2|>"}))
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))


CHANGES = [add_tokens, pad_on_the_left, without_begin, templates_in_a_list, templates_in_files, names_in_a_map]


def behaviour(folder):
    """What a user sees of a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {} if templates is None else {None: templates}
    texts = ["abcd <call>abc</call>", "a <pad> b<|eot_id|>"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    tokenizer.pad_token = tokenizer.pad_token or "<|eot_id|>"
    return (
        *(ids, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]),
        [tokenizer.decode(one, skip_special_tokens=skip) for one in ids for skip in (True, False)],
        tokenizer(["a", "abc a"], padding=True)["input_ids"],
        tokenizer("a b c d", truncation=True, max_length=2)["input_ids"],
        {name: tokenizer.apply_chat_template(TURNS, chat_template=name, tokenize=False) for name in named},
        *(tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces),
    )


def tokenizer_files(folder):
    names = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "additional_chat_templates", "vocab")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name.startswith(names)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_comes_back(change, folder, tmp_path):
    plain = behaviour(folder)
    change(folder)
    expected = behaviour(folder)
    assert expected != plain
    assert convert(folder, tmp_path / "meta").verification.tokenizer == "equal"
    assert convert(tmp_path / "meta", tmp_path / "wide", to="meta", mp=2).verification.tokenizer == "equal"
    assert convert(tmp_path / "wide", tmp_path / "back").verification.tokenizer == "equal"
    assert behaviour(tmp_path / "back") == expected
    assert tokenizer_files(tmp_path / "back") == tokenizer_files(folder)
    assert (tmp_path / "wide" / "tokenizer.model").is_file() and verify(folder, tmp_path / "wide").ok


def test_lists_of_hashes_name_files_in_folders(folder, tmp_path):
    templates_in_files(folder)
    convert(folder, tmp_path / "meta")
    check_sums(tmp_path / "meta" / CHECKLIST)
    convert(tmp_path / "meta", tmp_path / "back")
    assert "huggingface/additional_chat_templates/rag.jinja" in (tmp_path / "meta" / CHECKLIST).read_text()
    assert "additional_chat_templates/rag.jinja" in (tmp_path / "back" / CHECKSUMS).read_text()


def test_what_is_carried_is_said_before(folder, tmp_path):
    templates_in_files(folder)
    report = convert(folder, tmp_path / "meta", dry_run=True)
    assert not (tmp_path / "meta").exists()
    carried = "additional_chat_templates/rag.jinja, chat_template.jinja, tokenizer.json, tokenizer_config.json"
    assert any(f"huggingface/ keeps {carried}, and" in note for note in report.notes)
    assert "chat templates: default, rag" in inspect(folder).inferred


def test_every_named_template_makes_it_an_instruct_model(folder):
    templates_in_a_list(folder)
    assert inspect(folder).instruct and "chat templates: default, tool_use" in inspect(folder).inferred


@pytest.fixture
def foreign(tmp_path):
    """A folder whose tokenizer is GPT-2's kind: ids that do not follow merges, special tokens before the bytes."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder, fast.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["the cat and the hat and the bat"] * 9, trainer)
    folder = tmp_path / "foreign"
    hf_model(vocab_size=300, bos_token_id=1, eos_token_id=2, rope_parameters=None, rope_theta=10000.0).save_pretrained(
        folder
    )
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


def test_another_tokenizer_than_llamas_travels_whole(foreign, tmp_path):
    report = convert(foreign, tmp_path / "meta")
    assert report.verification.tokenizer == "equal" and not (tmp_path / "meta" / "tokenizer.model").exists()
    assert any("so Meta's own code has no tokenizer: " in note for note in report.notes)
    assert inspect(tmp_path / "meta").tokenizer == inspect(foreign).tokenizer == "tokenizer.json"
    assert convert(tmp_path / "meta", tmp_path / "back").verification.tokenizer == "equal"
    assert tokenizer_files(tmp_path / "back") == tokenizer_files(foreign)
    assert verify(foreign, tmp_path / "meta").ok and verify(foreign, tmp_path / "back").ok


def test_older_files_of_another_tokenizer(foreign, tmp_path):
    """vocab.json and merges.txt, as before tokenizer.json."""
    model = json.loads((foreign / "tokenizer.json").read_text())["model"]
    (foreign / "vocab.json").write_text(json.dumps(model["vocab"]))
    (foreign / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (foreign / "tokenizer.json").unlink()
    convert(foreign, tmp_path / "meta")
    assert convert(tmp_path / "meta", tmp_path / "back").verification.tokenizer == "equal"
    assert tokenizer_files(tmp_path / "back") == tokenizer_files(foreign)


def test_another_tokenizer_model_takes_the_place_of_what_was_carried(folder, tmp_path):
    pad_on_the_left(folder)
    convert(folder, tmp_path / "meta")
    with open(tmp_path / "meta" / "tokenizer.model", "ab") as file:
        file.write(b"YWJjZGE= 260\n")  # abcda
    (tmp_path / "meta" / CHECKLIST).unlink()
    report = convert(tmp_path / "meta", tmp_path / "back")
    assert "tokenizer: tokenizer.model, since it is not the one that came with huggingface/" in report.inferred
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back("abcda")["input_ids"][1:] == [260] and back.padding_side == "right"


@pytest.mark.parametrize("instruct", [True, False])
def test_the_other_kind_of_model_gets_a_tokenizer_of_its_own(instruct, folder, tmp_path):
    if not instruct:
        templates_in_files(folder)
    convert(folder, tmp_path / "meta")
    report = convert(tmp_path / "meta", tmp_path / "back", instruct=instruct)
    kind = "a base" if instruct else "an instruct"
    assert f"tokenizer: made anew, since huggingface/ is {kind} model's" in report.inferred
    assert (AutoTokenizer.from_pretrained(tmp_path / "back").chat_template is not None) is instruct
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert isinstance(generation["eos_token_id"], list) is instruct


def test_every_key_of_a_configuration_comes_back(folder, tmp_path):
    more = {"pretraining_tp": 2, "_name_or_path": "someone/model", "torch_dtype": "float16", "mine": {"a": [1]}}
    edit(folder / "config.json", lambda config: config.update(more | {"dtype": "float16", "bos_token_id": None}))
    before = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    convert(folder, tmp_path / "meta", mp=2)
    convert(tmp_path / "meta", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before
    assert not (tmp_path / "back" / "generation_config.json").exists()
    convert(tmp_path / "meta", tmp_path / "cast", dtype="float32", to="hf")
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "float32"


def test_generation_settings_come_back(folder, tmp_path):
    given = {"temperature": 0.1, "eos_token_id": [7, 261], "mine": 1}
    (folder / "generation_config.json").write_text(json.dumps(given))
    convert(folder, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == given


@pytest.mark.parametrize("to", ["hf", "meta", "dcp", "gguf"])
def test_what_no_format_has_a_place_for_is_named(to, folder, tmp_path):
    for name in ("LICENSE", "README.md", ".gitattributes"):
        (folder / name).write_text("mine")
    target = tmp_path / ("model.gguf" if to == "gguf" else "target")
    assert "left out, since it is no part of a model: LICENSE, README.md" in convert(folder, target, to=to).notes
    if to != "gguf":
        assert not any("left out" in note for note in convert(target, tmp_path / "again", to=to).notes)


ELSEWHERE = {
    "added_tokens.json": ("added_tokens.json", {"<new>": 516}),
    "a pad token set by hand": ("tokenizer_config.json", {"pad_token": "<new>"}),
    "extra tokens": ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<new>"}}),
    "additional tokens": ("tokenizer_config.json", {"additional_special_tokens": ["<new>"]}),
    "special_tokens_map.json": ("special_tokens_map.json", {"pad_token": "<new>"}),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_token_that_other_files_name(where, folder, tmp_path):
    """It has an id, the next one, and so a place in Meta's order; without a row it is refused before any work."""
    name, values = ELSEWHERE[where]
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    told = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(told | values))
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<new>") == 516
    assert convert(folder, tmp_path / "meta", to="meta").verification.tokenizer == "equal"
    assert convert(tmp_path / "meta", tmp_path / "again").verification.tokenizer == "equal"
    assert verify(folder, tmp_path / "again").ok
    hf_model(vocab_size=516).save_pretrained(tmp_path / "narrow")
    for path in folder.glob("*token*"):
        shutil.copy(path, tmp_path / "narrow")
    with pytest.raises(UserError, match=r"has 516 rows, and its tokenizer 517 ids: '<new>' \(516\); give them rows"):
        convert(tmp_path / "narrow", tmp_path / "narrow-meta", to="meta", dry_run=True)


def test_ids_beside_a_vocabulary_of_scored_pieces(tmp_path):
    """added_tokens.json says them: the pieces, a list, are no names with ids to go on from."""
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 516}))
    assert read_tokens(tmp_path) == {"<new>": 516}
