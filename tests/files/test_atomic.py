"""A target is whole or not there, whatever stops a run; the same command continues; nobody else's data is touched."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from checkpoints import params, write_meta
from forked import python
from interruptions import contents, some_of, stopped_run

from hf_llama3.conversion import convert, inspect, load_meta
from hf_llama3.errors import UserError
from hf_llama3.files import atomic, locking
from hf_llama3.files.atomic import MARKER, write_files

SHARDS = "60KB"  # several files


@pytest.fixture(params=["hf", "meta"])
def job(request, tmp_path):
    """A source, what its conversion makes when nothing happens, and the arguments of that conversion."""
    write_meta(tmp_path / "first", params(), mp=2)
    convert(tmp_path / "first", tmp_path / "hf", max_shard_size=SHARDS)
    source = tmp_path / ("first" if request.param == "hf" else "hf")
    options = {"max_shard_size": SHARDS} if request.param == "hf" else {"mp": 4}
    convert(source, tmp_path / "expected", **options)
    return source, tmp_path / "target", options, contents(tmp_path / "expected")


def looks_loadable(folder):
    """Whether a reader would take the folder for a finished model."""
    try:
        inspect(folder)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", ["kill", "interrupt", errno.ENOSPC, errno.EIO])
def test_stopped_anywhere_continues_to_the_same_files(kind, job):
    source, target, options, expected = job
    before = contents(source)
    total = int(stopped_run(kind, -1, source, target, options).stdout)
    shutil.rmtree(target)
    assert total > 30
    for at in some_of(total):
        result = stopped_run(kind, at, source, target, options)
        assert result.returncode != 0 or isinstance(kind, int), (at, result.stdout)
        if result.returncode and isinstance(kind, int):
            assert result.returncode == 2 and os.strerror(kind) in result.stderr, result.stderr
        assert not target.exists() or contents(target) == expected  # whole or not there
        assert not looks_loadable(target.with_name("target.partial"))
        assert contents(source) == before
        if not target.exists():
            convert(source, target, **options)
        assert contents(target) == expected, at
        assert {path.name for path in target.parent.iterdir()} <= {"first", "hf", "expected", "target"}, at
        shutil.rmtree(target)


def test_terminated_at_once_and_continued(job):
    source, target, options, expected = job
    assert stopped_run("terminate", 10, source, target, options).returncode == -signal.SIGTERM
    assert not target.exists()
    convert(source, target, **options)
    assert contents(target) == expected


def test_finished_files_are_kept_and_checked(job):
    source, target, options, expected = job
    total = int(stopped_run("kill", -1, source, target, options).stdout)
    shutil.rmtree(target)
    stopped_run("kill", total - 6, source, target, options)  # when all tensors are written
    partial = target.with_name("target.partial")
    finished = sorted(path.name for path in partial.iterdir() if path.suffix in (".pth", ".safetensors"))
    assert len(finished) > 1
    content = bytearray((partial / finished[0]).read_bytes())
    content[len(content) // 2] ^= 1  # a bit that rotted
    (partial / finished[0]).write_bytes(content)
    report = convert(source, target, **options)
    assert report.resumed == finished[1:]
    assert contents(target) == expected


def test_other_options_start_over(job):
    source, target, options, _ = job
    stopped_run("kill", 25, source, target, options)
    other = {"max_shard_size": "90KB"} if "max_shard_size" in options else {"mp": 2}
    convert(source, target, **other)
    convert(source, target.with_name("straight"), **other)
    assert contents(target) == contents(target.with_name("straight"))


@pytest.mark.parametrize("job", ["hf"], indirect=True)
@pytest.mark.parametrize("without_exchange", [False, True])
def test_old_target_stays_until_the_new_one_is_whole(without_exchange, job):
    """Also where the old one is nothing that this package made, and where two folders cannot be exchanged."""
    source, target, options, expected = job
    write_meta(target, params(), seed=5)
    old, how = contents(target), options | {"overwrite": True, "without_exchange": without_exchange}
    total = int(stopped_run("kill", -1, source, target, how).stdout)
    for at in some_of(total, last=22):
        shutil.rmtree(target)
        write_meta(target, params(), seed=5)
        assert stopped_run("kill", at, source, target, how).returncode == -signal.SIGKILL, at
        if target.exists():
            assert contents(target) in (old, expected), at
        else:
            assert without_exchange
            assert contents(target.with_name("target.replaced-by-hf-llama3") / "replaced") == old
        with pytest.raises(UserError, match="target already exists"):  # the old one, or the new
            convert(source, target, **options)
        assert contents(target) in (old, expected), at
        convert(source, target, **options, overwrite=True)
        assert contents(target) == expected, at
        assert {path.name for path in target.parent.iterdir()} <= {"first", "hf", "expected", "target"}, at


def test_a_full_disk(job):
    """RLIMIT_FSIZE stands for it: no file may grow beyond 20 kB."""
    source, target, options, _ = job
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        from hf_llama3.conversion.convert import UserError, convert
        try:
            convert({str(source)!r}, {str(target)!r}, **{options!r})
        except UserError as error:
            assert "could not be written (File too large)" in str(error), error
        else:
            raise AssertionError("written beyond the limit")
    """
    result = python("-c", textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    assert not target.exists()
    convert(source, target, **options)


def test_too_little_room_is_said_before_the_first_byte(job, monkeypatch):
    source, target, options, _ = job
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"needs \d+ bytes, but its disk has 1000 free; make room there"):
        convert(source, target, **options)
    assert not list(target.parent.glob("target*"))


def test_two_at_once(job):
    source, target, options, expected = job
    partial = target.with_name("target.partial")
    code = f"""
        import time
        from hf_llama3.files.atomic import staging
        from pathlib import Path
        with staging(Path({str(target)!r})):
            print("inside", flush=True)
            time.sleep(60)
    """
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "inside\n"
    try:
        with pytest.raises(UserError, match=r"another run is writing .*target; wait for it"):
            convert(source, target, **options)
        assert partial.exists()
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    convert(source, target, **options)  # the lock of a run that is dead holds nobody up
    assert contents(target) == expected


def test_a_folder_of_somebody_else_in_the_way(job):
    source, target, options, _ = job
    partial = target.with_name("target.partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is in the way and was not made by this package; move it elsewhere"):
        convert(source, target, **options)
    assert (partial / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_beside(overwrite, job):
    """What has the name under which an old target waits to be removed is not removed for that."""
    source, target, options, expected = job
    target.mkdir()
    waiting = target.with_name("target.replaced-by-hf-llama3")
    waiting.mkdir()
    (waiting / "thesis.txt").write_text("years of work")
    convert(source, target, **options, overwrite=overwrite)
    assert contents(target) == expected
    with pytest.raises(UserError, match="replaced-by-hf-llama3 is in the way and was not made by this package"):
        convert(source, target, **options, overwrite=True)
    assert contents(waiting) == {"thesis.txt": b"years of work"} and contents(target) == expected


def test_links_in_an_unfinished_folder(job):
    """Neither written through nor kept, though what they lead to is what would be written."""
    source, target, options, expected = job
    partial, elsewhere = target.with_name("target.partial"), target.with_name("elsewhere")
    shutil.copytree(target.with_name("expected"), elsewhere)
    partial.mkdir()
    (partial / MARKER).touch()
    for name in expected:
        (partial / name).symlink_to(elsewhere / name)
        (partial / f"{name}.partial").symlink_to(elsewhere / name)
    (partial / "folder").symlink_to(elsewhere)
    assert convert(source, target, **options).resumed == []
    assert contents(target) == expected == contents(elsewhere)
    assert not any(path.is_symlink() for path in target.iterdir())


def test_an_unfinished_folder_that_is_a_link(job):
    source, target, options, _ = job
    elsewhere = target.with_name("elsewhere")
    elsewhere.mkdir()
    target.with_name("target.partial").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is in the way"):
        convert(source, target, **options)
    assert not contents(elsewhere)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("none_of_files", [False, True])
def test_file_systems_without_locks_of_folders(none_of_files, job, monkeypatch):
    """A file beside stands for the lock: locked itself, or where nothing can be locked by being there."""
    source, target, options, expected = job

    def flock(handle, operation, original=locking.fcntl.flock):
        if os.path.isdir(handle):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if none_of_files:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return original(handle, operation)

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    with atomic.staging(target) as folder:
        (folder / "half").touch()
        with pytest.raises(UserError, match="another run is writing"):
            convert(source, target, **options)
    shutil.rmtree(target)
    with pytest.raises(RuntimeError), atomic.staging(target):
        raise RuntimeError("stopped")
    assert not target.with_name("target.partial.lock").exists()
    convert(source, target, **options)  # what was begun is still known as ours
    assert contents(target) == expected


@pytest.mark.parametrize("name", ["target.partial", "target.replaced-by-hf-llama3"])
def test_source_where_this_package_works(name, tmp_path):
    """A source that happens to have the name of the working folder is not taken for one."""
    write_meta(tmp_path / name, params())
    before = contents(tmp_path / name)
    with pytest.raises(UserError, match="must be apart; choose another target"):
        convert(tmp_path / name, tmp_path / "target")
    assert contents(tmp_path / name) == before


def test_symlinks(tmp_path):
    """A target that is a link is followed; what it points to is made or replaced, and the link stays."""
    write_meta(tmp_path / "meta", params())
    (tmp_path / "dangling").symlink_to(tmp_path / "real")
    convert(tmp_path / "meta", tmp_path / "dangling")
    assert (tmp_path / "real" / "config.json").exists() and (tmp_path / "dangling").is_symlink()
    convert(tmp_path / "meta", tmp_path / "dangling", overwrite=True)
    assert (tmp_path / "dangling").is_symlink() and inspect(tmp_path / "dangling").format == "hf"
    (tmp_path / "again").symlink_to(tmp_path / "meta")
    assert convert(tmp_path / "again", tmp_path / "from link").verification.ok


def test_unwritable_place(tmp_path):
    write_meta(tmp_path / "meta", params())
    with pytest.raises(UserError, match=r"its disk has 0 free|could not be written"):
        convert(tmp_path / "meta", "/proc/nobody-may-write-here/out")


def test_place_under_a_file(tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be made: .*file is a file"):
        convert(tmp_path / "meta", tmp_path / "file" / "out")


def test_unfinished_folders_are_not_read(tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta.lock").touch()  # another tool's
    assert inspect(tmp_path / "meta").format == "meta"
    (tmp_path / "meta" / MARKER).touch()
    for reader in (inspect, load_meta):
        with pytest.raises(UserError, match="is not finished; run the command that was writing it again"):
            reader(tmp_path / "meta")


def test_names_with_spaces_and_unicode(tmp_path):
    write_meta(tmp_path / "Mein Modell 🦙" / "größe 8", params())
    report = convert(tmp_path / "Mein Modell 🦙" / "größe 8", tmp_path / "das Ziel ✓")
    assert report.verification.ok and report.verification.target == str(tmp_path / "das Ziel ✓")


def test_the_kernel_call_can_be_missing(tmp_path, monkeypatch):
    """macOS and Windows have no copy_file_range, and some file systems refuse it."""
    tensors = write_meta(tmp_path / "meta", params())
    convert(tmp_path / "meta", tmp_path / "expected")
    for number, broken in enumerate((None, lambda *arguments: (_ for _ in ()).throw(OSError(errno.EXDEV, "no")))):
        if broken is None:
            monkeypatch.delattr(os, "copy_file_range")
            monkeypatch.delattr(os, "posix_fallocate")
        else:
            monkeypatch.setattr(os, "copy_file_range", broken, raising=False)
        convert(tmp_path / "meta", tmp_path / f"out{number}")
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / "expected")
    assert torch.equal(load_meta(tmp_path / "meta").model.norm.weight, tensors["norm.weight"])


def test_what_tells_a_checkpoint_is_written_last(tmp_path):
    """So that a folder which was left half-way, and opened by its temporary name, is none to any tool."""
    with pytest.raises(TypeError):
        write_files(tmp_path, {"config.json": b"{}", "tokenizer.json": None})
    assert not (tmp_path / "config.json").exists()
