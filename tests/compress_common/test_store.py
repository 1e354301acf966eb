# SPDX-License-Identifier: Apache-2.0
"""The store gives what was written, byte for byte and by its owner, or builds it again."""

import json
import logging
import multiprocessing
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path
from threading import Thread

import pytest

from compress_common.cache import cache_dir, temp_dir
from compress_common.errors import CompressError, LimitError
from compress_common.space import Need, check_space
from compress_common.store import Store, digest
from compress_common.store_entry import Entry

KEY, OTHER = digest("one"), digest("two")
NOBODY = 65534
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def build(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_bytes(b"world")
    (folder / "a").write_bytes(b"hello")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def leftovers(root: Path) -> list[Path]:
    """Everything in the store but entries and locks."""
    return [p for p in root.glob("*/.*")]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder for each test: the store falls back to it."""
    folder = tmp_path / "temporary"
    folder.mkdir(mode=0o777)
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that other users can reach, unlike ``tmp_path``."""
    folder = Path(tempfile.mkdtemp(prefix="test-store-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "temporary").mkdir()
    (folder / "temporary").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    yield folder
    shutil.rmtree(folder)


def unprivileged(check: Callable[[], None]) -> None:
    """Run the check in a process whose user permission bits bind."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        check()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def give_to_nobody(root: Path) -> None:
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def test_make_then_find(store: Store) -> None:
    assert store.find("plan", KEY) is None
    assert store.place("plan") == store.root and not store.root.exists()
    made = store.make("plan", KEY, build)
    assert made == store.root / "plan" / KEY == store.find("plan", KEY)
    assert store.place("plan") == store.root
    assert (made / "sub" / "b").read_bytes() == b"world"
    assert store.make("plan", KEY, never) == made
    assert store.find("plan", OTHER) is None and store.find("kernel", KEY) is None
    assert not leftovers(store.root)


def test_finding_in_an_empty_cache_writes_nothing(store: Store, temporary: Path) -> None:
    assert store.find("plan", KEY) is None
    assert not store.root.exists() and not any(temporary.iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_files_honor_the_umask_and_folders_are_private(store: Store, umask: int) -> None:
    def private(folder: Path) -> None:  # as safetensors writes
        build(folder)
        (folder / "a").chmod(0o600)

    before = os.umask(umask)
    try:
        made = store.make("plan", KEY, private)
    finally:
        os.umask(before)
    for path in (store.root, store.root / "plan", made, *made.rglob("*")):
        want = 0o700 if path.is_dir() else 0o666 & ~umask & ~stat.S_IWOTH
        assert stat.S_IMODE(path.stat().st_mode) == want, path


def flip(made: Path) -> None:
    content = bytearray((made / "a").read_bytes())
    content[2] ^= 1
    (made / "a").write_bytes(content)


def truncate_manifest(made: Path) -> None:
    manifest = made / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])


def other_key(made: Path) -> None:
    manifest = made / "manifest.json"
    manifest.write_text(manifest.read_text().replace(KEY, OTHER))


def other_version(made: Path) -> None:
    manifest = made / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))


def link_out(made: Path) -> None:
    """The same bytes, but somebody else's to change."""
    shutil.copy(made / "a", made.parent / "elsewhere")
    (made / "a").unlink()
    (made / "a").symlink_to(made.parent / "elsewhere")


def link_folder_out(made: Path) -> None:
    shutil.move(made / "sub", made.parents[2] / "sub")
    (made / "sub").symlink_to(made.parents[2] / "sub")


def link_entry_out(made: Path) -> None:
    shutil.move(made, made.parents[2] / "moved")
    made.symlink_to(made.parents[2] / "moved")


DAMAGES = {
    "byte": flip,
    "cut": lambda made: os.truncate(made / "sub" / "b", 3),
    "missing": lambda made: (made / "a").unlink(),
    "extra": lambda made: (made / "c").write_text("x"),
    "no manifest": lambda made: (made / "manifest.json").unlink(),
    "cut manifest": truncate_manifest,
    "other key": other_key,
    "other version": other_version,
    "link": link_out,
    "linked folder": link_folder_out,
    "linked entry": link_entry_out,
    "file writable by all": lambda made: (made / "a").chmod(0o666),
    "folder writable by all": lambda made: (made / "sub").chmod(0o777),
    "a file in its place": lambda made: (shutil.rmtree(made), made.write_text("x")),
}
if os.geteuid() == 0:
    DAMAGES["foreign file"] = lambda made: os.chown(made / "a", NOBODY, NOBODY)
    DAMAGES["foreign entry"] = lambda made: os.chown(made, NOBODY, NOBODY)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_returned(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = store.make("plan", KEY, build)
    DAMAGES[damage](made)
    assert store.find("plan", KEY) is None
    with caplog.at_level(logging.WARNING):
        assert store.make("plan", KEY, build) == made
    assert not made.is_symlink() and (made / "a").read_bytes() == b"hello"
    assert store.find("plan", KEY) == made and not leftovers(store.root)
    assert len(caplog.records) == 1 and "building it again" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_builder_that_raises_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(error):
        store.make("plan", KEY, fail)
    assert store.find("plan", KEY) is None
    assert [p.name for p in (store.root / "plan").iterdir()] == [f"{KEY}.lock"]


def test_a_builder_may_not_leave_links(store: Store) -> None:
    with pytest.raises(ValueError, match="no regular file"):
        store.make("plan", KEY, lambda folder: (folder / "a").symlink_to("/etc/passwd"))
    assert store.find("plan", KEY) is None


def test_leftovers_of_a_killed_builder_are_removed(store: Store) -> None:
    def die(folder: Path) -> None:
        build(folder)
        os._exit(9)

    child = multiprocessing.get_context("fork").Process(target=store.make, args=("plan", KEY, die))
    child.start()
    child.join(60)
    assert child.exitcode == 9 and leftovers(store.root)
    assert store.find("plan", KEY) is None
    store.make("plan", KEY, build)
    assert not leftovers(store.root)


def run_at_once(run: Callable[[], None]) -> None:
    """Run it in four processes, which all must succeed."""
    children = [multiprocessing.get_context("fork").Process(target=run) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4


def test_processes_that_ask_at_once_build_once(store: Store, tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        with (tmp_path / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.3)
        build(folder)

    def run() -> None:
        assert (store.make("plan", KEY, slow) / "a").read_bytes() == b"hello"

    run_at_once(run)
    assert (tmp_path / "builds").read_text() == "x"


def test_processes_that_wait_fail_with_the_builder(store: Store, tmp_path: Path) -> None:
    """None of them builds again, and none of them hangs. A later one does build."""

    def fails(folder: Path) -> None:
        with (tmp_path / "builds").open("a") as log:
            log.write("x")
        time.sleep(1)
        raise CompressError("the device is lost")

    def run() -> None:
        with pytest.raises(CompressError, match=r"^the device is lost$"):
            store.make("plan", KEY, fails)

    run_at_once(run)
    assert (tmp_path / "builds").read_text() == "x"
    assert store.make("plan", KEY, build) == store.find("plan", KEY)


def test_processes_that_wait_build_when_the_builder_meets_its_own_limit(
    store: Store, tmp_path: Path
) -> None:
    def limited(folder: Path) -> None:
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        raise LimitError("too little time")

    def first() -> None:
        with pytest.raises(LimitError, match="too little time"):
            store.make("plan", KEY, limited)

    child = multiprocessing.get_context("fork").Process(target=first)
    child.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    assert store.make("plan", KEY, build) == store.find("plan", KEY)
    child.join(10)
    assert child.exitcode == 0


def test_processes_that_wait_build_when_the_builder_is_killed(store: Store, tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (tmp_path / "begun").touch()
        time.sleep(60)

    child = multiprocessing.get_context("fork").Process(
        target=lambda: store.make("plan", KEY, killed)
    )
    child.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    thread = Thread(target=store.make, args=("plan", KEY, build))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    child.kill()
    thread.join(10)
    child.join(10)
    assert store.find("plan", KEY)


def test_processes_that_wait_see_how_far_the_builder_is(store: Store) -> None:
    seen: list[tuple[str, int, int]] = []

    def slow(folder: Path) -> None:
        store.report("gptq", 3, 32)
        time.sleep(1)
        build(folder)

    child = multiprocessing.get_context("fork").Process(
        target=lambda: store.make("plan", KEY, slow)
    )
    child.start()
    while not (store.root / "plan").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    store.make("plan", KEY, never, lambda *told: seen.append(told))
    child.join(10)
    assert set(seen) == {("another process: gptq", 3, 32)}
    assert not (store.root / "plan" / f"{KEY}.lock").read_bytes()


def test_an_entry_is_found_complete_or_not_at_all(store: Store) -> None:
    seen: list[Path | None] = []

    def watched(folder: Path) -> None:
        build(folder)
        seen.append(store.find("plan", KEY))  # with the lock taken: finding does not wait for it

    store.make("plan", KEY, watched)
    assert seen == [None]


def test_an_entry_is_found_in_a_read_only_cache(reachable: Path) -> None:
    root = reachable / "store"
    made = Store(root).make("plan", KEY, build)
    give_to_nobody(root)
    for path in (root, root / "plan", made, *made.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)

    def check() -> None:
        with pytest.raises(PermissionError):
            (root / "probe").touch()
        assert Store(root).find("plan", KEY) == made == Store(root).make("plan", KEY, never)

    unprivileged(check)
    for path in (root, root / "plan", made):  # or nobody but root could remove them
        path.chmod(0o700)


@is_root
def test_an_entry_of_root_is_found_by_others(reachable: Path) -> None:
    root = reachable / "store"
    made = Store(root).make("plan", KEY, build)
    for path in (root, root / "plan", made, made / "sub"):
        path.chmod(0o755)  # what an administrator does to share it

    def check() -> None:
        assert Store(root).make("plan", KEY, never) == made

    unprivileged(check)


def test_a_cache_that_cannot_be_written_is_left_for_a_private_folder(
    reachable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = reachable / "store"
    root.mkdir(mode=0o555)

    def check() -> None:
        assert Store(root).place("plan") == temp_dir()
        made = Store(root).make("plan", KEY, build)
        assert made == temp_dir() / "plan" / KEY and made.is_relative_to(reachable / "temporary")
        assert stat.S_IMODE(temp_dir().stat().st_mode) == 0o700
        [record] = caplog.records
        assert f"{root}/plan: Permission denied" in record.message
        assert "VLLM_COMPRESS_CACHE" in record.message and str(made) in record.message
        assert Store(root).make("plan", KEY, never) == made == Store(root).find("plan", KEY)

    unprivileged(check)


def test_a_cache_below_a_folder_that_cannot_be_entered(reachable: Path) -> None:
    private = reachable / "private"
    private.mkdir(mode=0o000)  # as /root is for the user of a container that has HOME=/root

    def check() -> None:
        store = Store(private / "not" / "there")
        assert store.place("plan") == temp_dir()
        check_space([Need(store.root, 1e18, "the plan", "VLLM_COMPRESS_CACHE")])  # not known
        assert store.make("plan", KEY, build) == temp_dir() / "plan" / KEY

    unprivileged(check)
    private.chmod(0o700)


@pytest.mark.parametrize("unsafe", ["world-writable", pytest.param("foreign", marks=is_root)])
def test_an_unsafe_root_is_refused(
    store: Store, unsafe: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.make("plan", KEY, build)
    if unsafe == "foreign":
        os.chown(store.root, NOBODY, NOBODY)
    else:
        store.root.chmod(0o777)
    assert store.find("plan", KEY) is None
    assert store.place("plan") == temp_dir()
    made = store.make("plan", KEY, build)
    assert made.is_relative_to(temp_dir())
    reason = "belongs to uid" if unsafe == "foreign" else "can be written by everyone"
    assert reason in caplog.text


def test_a_taken_name_in_the_temporary_folder_is_not_used(store: Store, temporary: Path) -> None:
    store.root.mkdir()
    store.root.chmod(0o777)
    (temporary / "target").mkdir(mode=0o700)
    temp_dir().symlink_to(temporary / "target")
    assert store.place("plan") == temporary
    made = store.make("plan", KEY, build)
    assert (made / "a").read_bytes() == b"hello"
    assert not made.is_relative_to(temp_dir()) and not any((temporary / "target").iterdir())
    assert stat.S_IMODE(made.parents[1].stat().st_mode) == 0o700


def test_no_folder_at_all_is_one_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.root.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(store.root))
    monkeypatch.setattr(
        "compress_common.store._session_folder", lambda: tempfile.TemporaryDirectory()
    )
    with pytest.raises(CompressError, match="VLLM_COMPRESS_CACHE") as error:
        store.make("plan", KEY, never)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_told_with_its_remedy(store: Store) -> None:
    def full(folder: Path) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with pytest.raises(CompressError) as error, store.writing("the plan"):
        store.make("plan", KEY, full)
    expected = f"cannot write the plan to {store.root}: No space left on device; set "
    assert str(error.value).startswith(f"{expected}VLLM_COMPRESS_CACHE")
    assert store.find("plan", KEY) is None


def test_the_root_may_be_a_link_of_this_user(store: Store, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    made = Store(tmp_path / "link").make("plan", KEY, build)
    assert made.is_relative_to(tmp_path / "disk")


@pytest.mark.parametrize("kind, key", [("../x", KEY), ("plan", "../x"), ("", KEY), ("plan", "ab")])
def test_kinds_and_keys_are_no_paths(store: Store, kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="not a kind"):
        store.find(kind, key)


def test_digest_tells_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("a", "b", "c")
    assert digest("ab") == digest(b"ab") and len(digest()) == 64


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("VLLM_COMPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/vllm-compress")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/vllm-compress")
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_a_user_without_home_has_a_private_cache(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_COMPRESS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)  # what expanduser looks up: no such user
    monkeypatch.setattr(os, "geteuid", lambda: 987654)
    assert cache_dir() == temporary / "vllm-compress-987654"


def test_a_working_directory_that_is_gone_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", "relative")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cache_dir() == temp_dir()


def test_removed_entries_are_built_again(store: Store) -> None:
    store.remove("plan", KEY)  # there is none
    store.make("plan", KEY, build)
    store.make("plan", OTHER, build)
    store.remove("plan", KEY)
    assert store.find("plan", KEY) is None
    assert store.find("plan", OTHER) is not None
    assert store.make("plan", KEY, build) == store.find("plan", KEY)


def test_a_removed_entry_leaves_no_lock_file(store: Store) -> None:
    store.make("plan", KEY, build)
    store.remove("plan", KEY)
    assert not list((store.root / "plan").iterdir())


def test_a_lock_file_that_is_removed_while_another_waits(store: Store) -> None:
    """The one that waits must not build under a lock that nobody else can see."""
    entry = Entry(store.root, "plan", KEY)
    lock, seen = entry.folder.with_name(f"{KEY}.lock"), []

    def look(folder: Path) -> None:
        seen.append(lock.exists())
        build(folder)

    with entry.locked():
        thread = Thread(target=store.make, args=("plan", KEY, look))
        thread.start()
        time.sleep(0.3)
        lock.unlink()
    thread.join(10)
    assert seen == [True] and store.find("plan", KEY)
