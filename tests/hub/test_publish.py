"""Folders pushed to a Hub: what arrives there, what is refused, and what happens when the way there is bad."""

import json
import shutil

import pytest
from checkpoints import params, small_tokenizer, write_meta
from command_line import run
from server import READER, WRITER

from hf_llama3.conversion import convert
from hf_llama3.model_card.publish import endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted folder with its licence, and beside the model what no model needs."""
    root = tmp_path_factory.mktemp("publish")
    write_meta(root / "meta", params(vocab=516), tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "model", max_shard_size="200KB")
    run("card", root / "model", "--license", "mit", "--output", root / "model" / "README.md")
    (root / "model" / "checkpoint-3").mkdir()
    (root / "model" / "checkpoint-3" / "model.safetensors").write_bytes(b"0")
    (root / "model" / ".env").write_text("TOKEN=hf_" + "a" * 34)
    return root / "model"


def new_weights(folder, tmp_path, seed):
    """A folder whose weights the Hub has never seen: what it has need not be sent."""
    tokenizer = small_tokenizer(tmp_path)
    write_meta(tmp_path / "meta", params(vocab=516), tokenizer=tokenizer, seed=seed)
    convert(tmp_path / "meta", tmp_path / "new", max_shard_size="200KB")
    shutil.copy(folder / "README.md", tmp_path / "new")
    return tmp_path / "new"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def test_push_and_again(hub, client, folder):
    pushed = client.run("push", folder, "lab/push")
    names = {path.name for path in folder.iterdir() if path.is_file()} - {".env"}
    held = hub.repos["lab/push"].files("main")
    assert held.keys() - {".gitattributes"} == names
    assert all(hub.content(held[name].sha256) == (folder / name).read_bytes() for name in names)
    assert "Left out: .env" in pushed.stdout and "Left out: checkpoint-3/" in pushed.stdout
    assert (
        'AutoModelForCausalLM.from_pretrained("lab/push")' in pushed.stdout and f"{hub.url}/lab/push" in pushed.stdout
    )
    assert 'from_pretrained("lab/push"' in (folder / "README.md").read_text()
    assert WRITER not in pushed.stdout + pushed.stderr
    commit = hub.repos["lab/push"].resolve("main")
    hub.clear()
    again = json.loads(client.run("push", folder, "lab/push", "--json").stdout)
    assert again["commit"] == commit == hub.repos["lab/push"].resolve("main")
    assert not hub.uploads() and not any("/commit/" in request.path for request in hub.log)


def test_dry_run(hub, client, copy):
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    report = json.loads(client.run("push", copy, "lab/dry", "--dry-run", "--json").stdout)
    assert report["commit"] is None and report["files"]["model-00001-of-00002.safetensors"] > 10_000
    assert report["bytes"] == sum(report["files"].values()) and ".env" in report["left_out"]
    assert not hub.log and before == {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}


def test_a_persons_card_wins(hub, client, copy):
    (copy / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    client.run("push", copy, "lab/person")
    held = hub.repos["lab/person"].files("main")
    assert hub.content(held["README.md"].sha256) == b"---\nlicense: mit\n---\nMy words.\n"
    assert "has the licence 'mit', got --license apache-2.0" in client.refuse(
        "push", copy, "lab/person", "--license", "apache-2.0"
    )
    (copy / "README.md").write_text("---\nlicense: mitt\n---\nMy words.\n")
    assert "README.md, line 2: `license` must be" in client.refuse("push", copy, "lab/person")


def test_metas_terms(hub, client, copy):
    pushed = client.run("push", copy, "lab/terms", "--license", "llama3.1").stdout
    held = hub.repos["lab/terms"].files("main")
    assert b"Llama 3.1 is licensed under the Llama 3.1 Community License" in hub.content(held["NOTICE"].sha256)
    assert b"Built with Llama" in hub.content(held["README.md"].sha256)
    assert "as LICENSE: https://www.llama.com/llama3_1/license" in pushed
    assert "begins with 'Llama'" in pushed
    (copy / "LICENSE").write_text("the agreement")
    (copy / "NOTICE").write_text("another's")
    assert "asks for this line in NOTICE: Llama 3.1 is" in client.run("push", copy, "lab/terms", "--dry-run").stdout
    (copy / "NOTICE").unlink()
    pushed = client.run("push", copy, "lab/Llama-3.1-Plays").stdout
    assert "Note" not in pushed and "LICENSE" in hub.repos["lab/Llama-3.1-Plays"].files("main")


def test_private_branch_and_pull_request(hub, client, copy):
    client.run("push", copy, "lab/private", "--private")
    assert hub.repos["lab/private"].private
    client.run("push", copy, "lab/public")
    assert "exists and is public" in client.refuse("push", copy, "lab/public", "--private")
    main = hub.repos["lab/public"].resolve("main")
    (copy / "LICENSE").write_text("terms")
    pushed = client.run("push", copy, "lab/public", "--revision", "second").stdout
    assert "revision='second'" in pushed and "LICENSE" in hub.repos["lab/public"].files("second")
    pushed = client.run("push", copy, "lab/public", "--create-pr").stdout
    assert "revision='refs/pr/1'" in pushed and f"{hub.url}/lab/public/discussions/1" in pushed
    assert "LICENSE" in hub.repos["lab/public"].files("refs/pr/1")
    (copy / "USE_POLICY.md").write_text("terms")
    client.run("push", copy, "lab/public", "--revision", "refs/pr/1")  # goes on in the same one
    assert "USE_POLICY.md" in hub.repos["lab/public"].files("refs/pr/1")
    assert hub.repos["lab/public"].resolve("main") == main
    assert "leave one out" in client.refuse("push", copy, "lab/public", "--create-pr", "--revision", "second")


REMOTE = {"AutoTokenizer": ["code.Tokenizer", None]}


def add(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    (path.parent / "SHA256SUMS").unlink()


def change(path, content):
    path.write_bytes(content(path.read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda to: (to / "config.json").unlink(), "but no configuration"),
        (lambda to: (to / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002"),
        (lambda to: change(to / "model-00001-of-00002.safetensors", lambda b: b[:-1] + b"\x01"), "must have the hash"),
        (lambda to: change(to / "tokenizer.json", lambda b: b"{}"), "tokenizer.json lacks `model`"),
        (
            lambda to: (to / "LICENSE").write_text("see\nhf_" + "b" * 34),
            "LICENSE, line 2, holds what looks like a token",
        ),
        (lambda to: (to / "chat_template.jinja").symlink_to("/etc/hostname"), "outside of the folder"),
        (lambda to: add(to / "tokenizer_config.json", secret="hf_" + "b" * 34), "holds what looks like a token"),
        (
            lambda to: add(to / "tokenizer_config.json", tokenizer_class="OddTokenizer", auto_map=REMOTE),
            "cannot be loaded by transformers",
        ),
        (lambda to: (to / "README.md").write_text("no keys"), "has no `license` in its front matter"),
        (lambda to: (to / "README.md").unlink(), "has no licence yet; add --license"),
    ],
)
def test_what_is_not_fit(hub, client, copy, spoil, message):
    spoil(copy)
    said = client.refuse("push", copy, "lab/unfit")
    assert message in said
    assert "b" * 34 not in said and not hub.log


def test_our_own_type(hub, client, folder, tmp_path):
    convert(folder, tmp_path / "own", to="hf", model_type="llama3")
    pushed = client.run("push", tmp_path / "own", "lab/own", "--license", "mit").stdout
    assert 'from_pretrained("lab/own", trust_remote_code=True)' in pushed
    assert "modeling_llama3.py" in hub.repos["lab/own"].files("main")
    (tmp_path / "own" / "SHA256SUMS").unlink()
    change(tmp_path / "own" / "norm.py", lambda content: content + b"\n")
    assert "norm.py is not the one of this package" in client.refuse("push", tmp_path / "own", "lab/own")
    (tmp_path / "own" / "norm.py").unlink()
    assert "lacks norm.py" in client.refuse("push", tmp_path / "own", "lab/own")


def test_weights_under_other_names(hub, client, folder, tmp_path):
    """Those of an earlier push would be loaded in place of the new ones; names are no patterns."""
    convert(folder, tmp_path / "one", to="hf")
    client.run("push", tmp_path / "one", "lab/weights", "--license", "mit")
    client.run("push", folder, "lab/weights")
    names = {name for name in hub.repos["lab/weights"].files("main") if "safetensors" in name}
    assert names == {path.name for path in folder.iterdir() if "safetensors" in path.name}
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    index = (odd / "model.safetensors.index.json").read_text()
    (odd / "model.safetensors.index.json").write_text(index.replace("model-00001", "m[1]"))
    (odd / "model-00001-of-00002.safetensors").rename(odd / "m[1]-of-00002.safetensors")
    (odd / "SHA256SUMS").unlink()
    client.run("push", odd, "lab/odd")
    assert "m[1]-of-00002.safetensors" in hub.repos["lab/odd"].files("main")


def test_an_address_with_a_password(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:secret@hub.example/api")
    assert endpoint() == "https://hub.example/api"


def test_who_may_not(hub, client, copy):
    assert "log in by `hf auth login`" in client.refuse("push", copy, "lab/who", HF_TOKEN="hf_wrong")
    assert "use a token that may write there" in client.refuse("push", copy, "lab/who", HF_TOKEN=READER)
    assert "use a token that may write there" in client.refuse("push", copy, "others/who")
    assert "check the name, or leave out --create-pr" in client.refuse("push", copy, "lab/nowhere", "--create-pr")
    assert "has no revision 'refs/pr/9'" in client.refuse("push", copy, "lab/push", "--revision", "refs/pr/9")
    assert "must be named as owner/name, got 'plays'" in client.refuse("push", copy, "plays")
    for name in ("lab/a--b", "lab/x.git", "lab/m\u00f6del", f"lab/{'a' * 100}"):
        assert f"must be named as the Hub allows, got {name!r}" in client.refuse("push", copy, name, "--dry-run")
    assert "other letters than a token has" in client.refuse("push", copy, "lab/who", HF_TOKEN="hf_\u00e9")
    assert "lab/who" not in hub.repos


def test_a_bad_way(hub, client, folder, tmp_path):
    """Faults in the middle of an upload; the same command then sends what was not kept, and nothing twice."""
    copy = new_weights(folder, tmp_path, seed=1)
    sizes = {path.name: path.stat().st_size for path in copy.glob("*.safetensors")}
    hub.fail(400, times=99, method="PUT", path="/lfs/")  # which is not tried again, while a cut one is, below
    said = client.refuse("push", copy, "lab/way")
    assert "with 400" in said and "the same command goes on where it stopped" in said, said
    hub.clear()
    hub.fail(500, times=99, method="POST", path="/commit/")
    said = client.refuse("push", copy, "lab/way")
    assert "with 500" in said and "goes on where it stopped" in said, said
    assert sorted(hub.uploads().values()) == sorted(sizes.values())
    hub.clear()
    client.run("push", copy, "lab/way")
    assert not hub.uploads()  # all was there, but for the commit
    assert {name for name in hub.repos["lab/way"].files("main") if name in sizes} == sizes.keys()


def test_one_fault_is_borne(hub, client, folder, tmp_path):
    copy = new_weights(folder, tmp_path, seed=2)
    hub.drop(5_000, method="PUT", path="/lfs/")
    hub.fail(503, method="PUT", path="/lfs/")
    hub.fail(429, path="/preupload/", Retry_After="1")
    client.run("push", copy, "lab/borne")
    assert "model-00001-of-00002.safetensors" in hub.repos["lab/borne"].files("main")
    assert {0, 429, 503} <= {request.status for request in hub.log}


def test_no_repository_to_be_had(hub, client, copy):
    hub.fail(429, times=99, path="/api/repos/create")
    assert "with 429" in (said := client.refuse("push", copy, "lab/many")) and "wait some minutes" in said
    hub.clear()
    hub.drop(0, times=99, path="/api/repos/create")
    assert f"the upload to {hub.url}/lab/many was cut off (RemoteProtocolError)" in client.refuse(
        "push", copy, "lab/many"
    )
