"""What the Hub answers to requests that read, as huggingface_hub 2.4 sends them (hf_api.py, file_download.py there)."""

import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qs

from repositories import HubError, User

MODEL = "/api/models/{owner}/{repo}"
STORE = "/store"  # to where requests for large files are sent on, if they are


@dataclass
class Call:
    hub: object  # server.Hub
    path: str  # as it was sent
    user: User | None
    parts: dict[str, str]  # of the path, as the pattern names them
    options: dict[str, str]  # of the query
    body: bytes
    headers: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.parts['owner']}/{self.parts['repo']}"

    @property
    def revision(self) -> str:
        return self.parts.get("revision") or "main"

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")


def whoami(call: Call):
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    role = {"accessToken": {"displayName": "test", "role": "write" if call.user.writes else "read"}}
    return 200, {}, {"type": "user", "id": call.user.name, "name": call.user.name, "orgs": [], "auth": role}


def model_info(call: Call):
    repo = call.hub.see(call.name, call.user)
    commit = repo.resolve(call.revision)
    return (
        200,
        {"X-Repo-Commit": commit},
        {
            "_id": "0" * 24,
            "id": repo.name,
            "modelId": repo.name,
            "author": call.parts["owner"],
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2024-04-18T00:00:00.000Z",
            "createdAt": "2024-04-18T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(repo.files(commit))],
        },
    )


def tree(call: Call):
    """List files, a page at a time; the next one's address is in the header Link."""
    repo = call.hub.see(call.name, call.user)
    recursive = call.options.get("recursive", "").lower() in ("true", "1")
    entries = repo.entries(call.revision, call.parts["path"], recursive)
    start, size = int(call.options.get("cursor", 0)), call.hub.page_size
    headers = {}
    if start + size < len(entries):
        query = f"recursive={recursive}&expand=False&cursor={start + size}"
        headers["Link"] = f'<{call.hub.url}{call.path}?{query}>; rel="next"'
    return 200, headers, entries[start : start + size]


def paths_info(call: Call):
    repo = call.hub.see(call.name, call.user)
    files, wanted = repo.files(call.revision), parse_qs(call.body.decode()).get("paths", [])
    return 200, {}, [files[path].entry(path) for path in wanted if path in files]


def refs(call: Call):
    repo = call.hub.see(call.name, call.user)
    branches, pulls = [], []
    for name, commit in repo.refs.items():
        is_pull = name.startswith("refs/pr/")
        ref = name if is_pull else f"refs/heads/{name}"
        (pulls if is_pull else branches).append({"name": name, "ref": ref, "targetCommit": commit})
    return 200, {}, {"branches": branches, "tags": [], "converts": [], "pullRequests": pulls}


def commits(call: Call):
    """List the commits of a repository, the latest first; branches are not told apart."""
    repo = call.hub.see(call.name, call.user)
    repo.resolve(call.revision)
    about = {"authors": [{"user": call.parts["owner"]}], "date": "2024-04-18T00:00:00.000Z", "message": ""}
    return 200, {}, [{"id": oid, "title": title} | about for oid, title in reversed(repo.messages.items())]


def resolve(call: Call):
    """Send a file, or the part that Range asks for."""
    repo = call.hub.read(call.name, call.user)
    commit, file = repo.resolve(call.revision), repo.find(call.revision, call.parts["path"])
    if file.large and call.hub.redirects and not call.path.startswith(STORE):
        linked = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": file.size}
        return 302, linked | {"Location": call.hub.url + STORE + call.path}, b""
    content = call.hub.content(file.sha256)
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.large:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": file.size}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if not wanted or not call.hub.serves_parts:
        return 200, headers, content
    start, last = int(wanted[1]), min(int(wanted[2] or file.size), file.size - 1)
    if start >= file.size:
        raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{file.size}"})
    return 206, headers | {"Content-Range": f"bytes {start}-{last}/{file.size}"}, content[start : last + 1]


def route(methods: str, path: str, function):
    """Compile a path in which {name} is one part of it, and {path} what is left, which may be nothing."""
    pattern = re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path.replace("{path}", "(?:/(?P<path>.*))?"))
    return methods.split(), pattern, function


ROUTES = [
    route("GET", "/api/whoami-v2", whoami),
    route("GET", MODEL, model_info),
    route("GET", MODEL + "/revision/{revision}", model_info),
    route("GET", MODEL + "/tree/{revision}{path}", tree),
    route("POST", MODEL + "/paths-info/{revision}", paths_info),
    route("GET", MODEL + "/refs", refs),
    route("GET", MODEL + "/commits/{revision}", commits),
    route("GET HEAD", "/{owner}/{repo}/resolve/{revision}{path}", resolve),
    route("GET HEAD", STORE + "/{owner}/{repo}/resolve/{revision}{path}", resolve),
]
