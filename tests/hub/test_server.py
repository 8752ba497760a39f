"""The Hub of these tests is one to huggingface_hub and transformers: all they send, and what comes back of it."""

import pytest
from checkpoints import params, small_tokenizer, write_meta
from server import READER, WRITER

from hf_llama3.conversion import convert

ROUND_TRIP = """
import hf_llama3
from huggingface_hub import HfApi, get_safetensors_metadata, snapshot_download
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

model = hf_llama3.Llama3ForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
for what in (model, model.config, tokenizer):
    what.push_to_hub("lab/pushed")
model.push_to_hub("lab/pushed", revision="dev")
again = AutoModelForCausalLM.from_pretrained("lab/pushed", revision="dev").state_dict()
same = all((again[name] == weight).all() for name, weight in model.state_dict().items())
api = HfApi()
proposed = api.upload_folder(repo_id="lab/pushed", folder_path=FOLDER, create_pr=True, delete_patterns="*.md")
there = Path(snapshot_download("lab/pushed", revision=proposed.pr_revision))
names = {path.name for path in Path(FOLDER).iterdir()}
result = {
    "same": bool(same),
    "config": AutoConfig.from_pretrained("lab/pushed").hidden_size,
    "text": AutoTokenizer.from_pretrained("lab/pushed").decode(tokenizer("abcd")["input_ids"]),
    "user": api.whoami()["name"],
    "pull request": proposed.pr_url,
    "fetched": all((there / name).read_bytes() == (Path(FOLDER) / name).read_bytes() for name in names),
    "listed": api.list_repo_files("lab/pushed"),
    "paths": [entry.path for entry in api.get_paths_info("lab/pushed", ["model.safetensors", "nothing"])],
    "branches": sorted(ref.name for ref in api.list_repo_refs("lab/pushed").branches),
    "exists": [api.file_exists("lab/pushed", "config.json"), api.revision_exists("lab/pushed", "v9")],
    "headers": list(get_safetensors_metadata("lab/pushed").files_metadata),
}
"""
UPLOAD = "from huggingface_hub import HfApi\nHfApi().upload_folder(repo_id={!r}, folder_path={!r})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model in one file."""
    root = tmp_path_factory.mktemp("server")
    write_meta(root / "meta", params(vocab=516), tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "hf", verify=False)
    return root / "hf"


def test_round_trip(hub, client, folder):
    hub.page_size = 2
    found = client.python(f"FOLDER = {str(folder)!r}\n{ROUND_TRIP}")
    hub.page_size = 1000
    assert found == {
        "same": True,
        "config": 64,
        "text": "<|begin_of_text|>abcd",
        "user": "lab",
        "pull request": f"{hub.url}/lab/pushed/discussions/1",
        "fetched": True,
        "listed": sorted(held := hub.repos["lab/pushed"].files()),
        "paths": ["model.safetensors"],
        "branches": ["dev", "main"],
        "exists": [True, False],
        "headers": ["model.safetensors"],
    }
    assert "README.md" in held and "README.md" not in hub.repos["lab/pushed"].files("refs/pr/1")


def test_an_upload_that_is_cut_off_is_sent_again_and_held_once(hub, client, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0123456789" * 50_000)
    hub.create("lab/upload", private=False)
    hub.drop(3000, method="PUT")
    hub.fail(503, method="POST", path="/preupload/")
    client.python(UPLOAD.format("lab/upload", str(tmp_path)))
    assert [request.received for request in hub.log if request.method == "PUT"] == [3000, 500_000]
    assert hub.repos["lab/upload"].files().keys() == {".gitattributes", "model.safetensors"}
    commits = len(hub.repos["lab/upload"].commits)
    hub.clear()
    client.python(UPLOAD.format("lab/upload", str(tmp_path)))
    assert not hub.uploads() and len(hub.repos["lab/upload"].commits) == commits


CARD = "---\\nlicense: [\\n---\\n"
BAD_CARD = f"api.upload_file(path_or_fileobj=b'{CARD}', path_in_repo='README.md', repo_id='lab/taken')"
OLD_PARENT = "api.upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='lab/taken', parent_commit='0' * 40)"


@pytest.mark.parametrize(
    "source, token, error",
    [
        ("api.create_repo('lab/taken')", WRITER, "409 Conflict"),
        ("api.create_repo('lab/new')", READER, "403 Forbidden: You don't have the rights"),
        ("api.create_repo('else/new')", WRITER, "403 Forbidden: You don't have the rights"),
        ("api.whoami()", "hf_wrong", "Invalid user token"),
        ("api.model_info('lab/nothing')", WRITER, "RepositoryNotFoundError: 404"),
        ("api.model_info('lab/nothing')", "", "RepositoryNotFoundError: 401"),
        ("api.model_info('lab/taken', revision='v9')", WRITER, "RevisionNotFoundError: 404"),
        ("api.hf_hub_download('lab/taken', 'nothing')", WRITER, "RemoteEntryNotFoundError: 404"),
        ("api.create_branch('lab/taken', branch='main')", WRITER, "409 Conflict"),
        (BAD_CARD, WRITER, "ValueError: Invalid metadata in README.md"),
        (OLD_PARENT, WRITER, "412"),
    ],
)
def test_refusals(source, token, error, hub, client):
    if "lab/taken" not in hub.repos:
        hub.create("lab/taken", private=False)
    with pytest.raises(RuntimeError, match=error):
        client.python(f"from huggingface_hub import HfApi\napi = HfApi()\n{source}", HF_TOKEN=token)
