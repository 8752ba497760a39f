"""What the Hub answers to requests that write, as huggingface_hub 2.4 sends them (_commit_api.py, lfs.py there)."""

import base64
import hashlib
import json
import re

import yaml
from hub_reading import MODEL, Call, route
from repositories import HubError, Repository, is_large

LFS = "/{owner}/{repo}.git/info/lfs/objects"


def create_repo(call: Call):
    owner = call.json.get("organization") or (call.user and call.user.name)
    call.hub.check_rights(owner, call.user)
    name = f"{owner}/{call.json['name']}"
    url = {"url": f"{call.hub.url}/{name}"}
    if name in call.hub.repos:  # huggingface_hub reads the address from this answer as well
        return 409, {}, {"error": "You already created this model repo"} | url
    call.hub.create(name, call.json.get("private", False) or call.json.get("visibility") == "private")
    return 200, {}, url | {"name": name, "id": name}


def validate_yaml(call: Call):
    """Check a card's front matter as far as every card needs it: a mapping, its licence and tags of the right kind."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", call.json["content"], re.DOTALL)
    if not found:
        return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return 400, {}, {"errors": [{"message": f"YAML: {error}"}], "warnings": []}
    kinds = {"license": str, "tags": list, "base_model": (str, list), "pipeline_tag": str, "library_name": str}
    wrong = ["metadata must be an object"] if not isinstance(data, dict) else []
    for name, kind in kinds.items():
        if not wrong and name in data and not isinstance(data[name], kind):
            wrong.append(f'"{name}" must be {kind}')
    errors = [{"message": message} for message in wrong]
    return 400 if errors else 200, {}, {"errors": errors, "warnings": []}


def create_branch(call: Call):
    repo = call.hub.write(call.name, call.user)
    if call.revision in repo.refs:
        raise HubError(409, f"Reference already exists: refs/heads/{call.revision}")
    repo.refs[call.revision] = repo.resolve(call.json.get("startingPoint", "main"))
    return 200, {}, {}


def delete_branch(call: Call):
    repo = call.hub.write(call.name, call.user)
    repo.resolve(call.revision)
    del repo.refs[call.revision]
    return 200, {}, {}


def preupload(call: Call):
    """Say of each file whether it goes into git, and which one the branch holds."""
    repo = may_commit(call)
    files, answer = repo.files(call.revision), []
    for wanted in call.json["files"]:
        path, size = wanted["path"], wanted["size"]
        known = {"oid": files[path].etag} if path in files else {}
        mode = "lfs" if is_large(path, size) else "regular"
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
    return 200, {}, {"files": answer, "commitOid": repo.resolve(call.revision)}


def may_commit(call: Call) -> Repository:
    """Find the repository to change; a pull request may come from anybody who sees it and may write elsewhere."""
    if "create_pr" not in call.options:
        return call.hub.write(call.name, call.user)
    repo = call.hub.see(call.name, call.user)
    call.hub.check_rights(call.user.name if call.user else "", call.user)
    return repo


def lfs_batch(call: Call):
    """Say where to upload each large file that is not there yet."""
    may_upload(call)
    objects = []
    for wanted in call.json["objects"]:
        upload = {"href": f"{call.hub.url}/lfs/{wanted['oid']}"}
        verify = {"href": f"{call.hub.url}/{call.name}.git/info/lfs/objects/verify"}
        new = {} if call.hub.holds(wanted["oid"]) else {"actions": {"upload": upload, "verify": verify}}
        objects.append({"oid": wanted["oid"], "size": wanted["size"]} | new)
    return 200, {}, {"transfer": "basic", "objects": objects}


def may_upload(call: Call):
    call.hub.see(call.name, call.user)
    call.hub.check_rights(call.user.name if call.user else "", call.user)


def lfs_upload(call: Call):
    if hashlib.sha256(call.body).hexdigest() != call.parts["oid"]:
        raise HubError(400, "The content does not have the announced SHA-256")
    call.hub.keep(call.body)
    return 200, {"ETag": f'"{call.parts["oid"]}"'}, b""


def lfs_verify(call: Call):
    may_upload(call)
    if not call.hub.holds(call.json["oid"]) or len(call.hub.content(call.json["oid"])) != call.json["size"]:
        raise HubError(422, "The object was not uploaded")
    return 200, {}, {}


def commit(call: Call):
    """Apply the operations of a commit, to a branch or as a pull request against it."""
    repo = may_commit(call)
    operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(operation["value"] for operation in operations if operation["key"] == "header")
    with repo.changing:
        parent = repo.resolve(call.revision)
        if header.get("parentCommit", parent) != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(parent))
        for operation in operations:
            value, path = operation["value"], operation["value"].get("path")
            match operation["key"]:
                case "file":
                    files[path] = call.hub.store(path, base64.b64decode(value["content"]))
                case "lfsFile":
                    if not call.hub.holds(value["oid"]):
                        raise HubError(400, f"{path}: the LFS object {value['oid']} was not uploaded")
                    files[path] = call.hub.store(path, call.hub.content(value["oid"]))
                case "deletedFile":
                    if files.pop(path, None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
        ref, answer = call.revision, {}
        if "create_pr" in call.options:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{call.hub.url}/{repo.name}/discussions/{number}"}
        oid = repo.commit(ref, files, header["summary"])
    address = {"commitOid": oid, "commitUrl": f"{call.hub.url}/{repo.name}/commit/{oid}", "hookOutput": ""}
    return 200, {}, {"success": True} | address | answer


ROUTES = [
    route("POST", "/api/repos/create", create_repo),
    route("POST", "/api/validate-yaml", validate_yaml),
    route("POST", MODEL + "/branch/{revision}", create_branch),
    route("DELETE", MODEL + "/branch/{revision}", delete_branch),
    route("POST", MODEL + "/preupload/{revision}", preupload),
    route("POST", MODEL + "/commit/{revision}", commit),
    route("POST", LFS + "/batch", lfs_batch),
    route("POST", LFS + "/verify", lfs_verify),
    route("PUT", "/lfs/{oid}", lfs_upload),
]
