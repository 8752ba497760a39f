"""What a Hub holds: repositories, their commits and who may see them; the bytes lie in a folder, by their SHA-256."""

import fnmatch
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

# As the `.gitattributes` that the Hub puts into a new repository says, as far as it concerns us
LARGE_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.model", "*.gguf", "*.onnx")
LARGE_SIZE = 10 * 2**20  # bytes: the Hub takes no larger file into git
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES).encode()


class HubError(Exception):
    """Refuse a request as the Hub does: by a status, a sentence and a code that huggingface_hub knows."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | headers
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class User:
    name: str
    writes: bool = True
    accepted: set[str] = field(default_factory=set)  # gated repositories whose licence was accepted


@dataclass
class File:
    sha256: str
    size: int
    blob_id: str  # git's name for the content
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def entry(self, path: str) -> dict:
        """Describe the file as `tree` and `paths-info` do."""
        pointer = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": path, "oid": self.blob_id, "size": self.size} | pointer


@dataclass
class Repository:
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> path -> file
    refs: dict[str, str] = field(default_factory=dict)  # "main", "refs/pr/1" -> commit
    messages: dict[str, str] = field(default_factory=dict)  # commit -> summary
    changing: threading.Lock = field(default_factory=threading.Lock)

    def resolve(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.resolve(revision)]

    def find(self, revision: str, path: str) -> File:
        commit = self.resolve(revision)
        if path not in self.commits[commit]:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        return self.commits[commit][path]

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        """Make `ref` point to a new commit that holds `files`."""
        known = f"{self.name}{len(self.commits)}{message}{sorted((path, file.sha256) for path, file in files.items())}"
        oid = hashlib.sha1(known.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = files, message, oid
        return oid

    def entries(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        """List a folder as `tree` does, folders included."""
        prefix, found = f"{folder}/" if folder else "", {}
        for path, file in sorted(self.files(revision).items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                inner = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    found[inner] = {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                found[path] = file.entry(path)
        if folder and not found:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return list(found.values())


class Repositories:
    """Hold repositories and users, and say who may do what.

    Raises:
        HubError: in every method, what the Hub would answer.
    """

    def __init__(self, folder: Path):
        self.folder, self.repos, self.users = Path(folder), {}, {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def user(self, token: str | None) -> User | None:
        if token is not None and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def see(self, name: str, user: User | None) -> Repository:
        """Find a repository; a private one of somebody else is as one that does not exist."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and (user is None or not name.startswith(f"{user.name}/"))):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def read(self, name: str, user: User | None) -> Repository:
        """Find a repository whose files are wanted."""
        repo = self.see(name, user)
        if repo.gated and (user is None or name not in user.accepted):
            message = f"Access to model {name} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    def write(self, name: str, user: User | None) -> Repository:
        """Find a repository that is to change."""
        repo = self.see(name, user)
        self.check_rights(name.split("/")[0], user)
        return repo

    def check_rights(self, namespace: str, user: User | None):
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.writes or user.name != namespace:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    def create(self, name: str, private: bool, gated: bool = False) -> Repository:
        """Make a repository with its first commit.

        Raises:
            HubError: the name is taken.
        """
        if name in self.repos:
            raise HubError(409, "You already created this model repo")
        repo = self.repos[name] = Repository(name, private, gated)
        repo.commit("main", {".gitattributes": self.store(".gitattributes", GITATTRIBUTES)}, "initial commit")
        return repo

    def store(self, path: str, content: bytes) -> File:
        """Keep the content that a commit has under `path`."""
        sha256 = self.keep(content)
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(sha256, len(content), blob_id, is_large(path, len(content)))

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return sha256

    def holds(self, sha256: str) -> bool:
        return (self.folder / sha256).exists()

    def content(self, sha256: str) -> bytes:
        return (self.folder / sha256).read_bytes()


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file outside git; an empty one it never does."""
    name = path.split("/")[-1]
    return size > 0 and (size > LARGE_SIZE or any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_FILES))
