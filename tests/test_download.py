"""download.sh against a local server that misbehaves on purpose, with curl and with wget."""

import hashlib
import http.server
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "download.sh"
SECRET = "Signature=x~Y_z-0"
QUERY = f"Policy=a b&{SECRET}&Key-Pair-Id=K%2B1"
SHARD = "llama-2-7b/consolidated.00.pth"

# All that the script may call; curl, wget, df and md5sum are added one by one.
COMMANDS = ["awk", "bash", "cat", "cut", "dirname", "env", "grep", "head", "mkdir", "mktemp"]
COMMANDS += ["mv", "rm", "rmdir", "sleep", "wc"]
DF = """#!/bin/sh
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo 'a volume 2000000000 0 {free} 0% /a volume'
"""
BSD_MD5 = """#!/bin/sh
test "$1" = -q && test $# -eq 2 || exit 64
{md5sum} < "$2" | {cut} -c 1-32
"""


def checklist(files: dict[str, bytes], *names: str) -> bytes:
    lines = [f"{hashlib.md5(files[name]).hexdigest()}  {Path(name).name}\n" for name in names]
    return "".join(lines).encode()


def content(name: str, size: int = 5000) -> bytes:
    return (hashlib.sha256(name.encode()).digest() * (size // 32 + 1))[:size]


def llama_2(folder: str, shards: int) -> dict[str, bytes]:
    names = [f"{folder}/consolidated.{shard:02d}.pth" for shard in range(shards)]
    names.append(f"{folder}/params.json")
    files = {name: content(name) for name in [*names, "LICENSE", "USE_POLICY.md"]}
    files["tokenizer.model"] = content("tokenizer.model")
    files["tokenizer_checklist.chk"] = checklist(files, "tokenizer.model")
    files[f"{folder}/checklist.chk"] = checklist(files, *names)
    return files


def llama_3(folder: str, shards: int, *more: str) -> dict[str, bytes]:
    """A folder of Llama 3, whose checklists have ./ before the names from 3.1 on."""
    names = [f"{folder}/consolidated.{shard:02d}.pth" for shard in range(shards)]
    names += [f"{folder}/params.json", f"{folder}/tokenizer.model"]
    files = {name: content(name) for name in [*names, *more]}
    listed = checklist(files, *names)
    files[f"{folder}/checklist.chk"] = listed if more else listed.replace(b"  ", b"  ./")
    return files


def code_llama(folder: str, shards: int) -> dict[str, bytes]:
    names = [f"{folder}/consolidated.{shard:02d}.pth" for shard in range(shards)]
    names += [f"{folder}/params.json", f"{folder}/tokenizer.model"]
    files = {name: content(name) for name in [*names, "LICENSE", "USE_POLICY.md"]}
    files[f"{folder}/checklist.chk"] = checklist(files, *names)
    return files


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's files with ranges, unless a fault is due for the file."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, _, self.query = self.path.partition("?")
        self.name = path.lstrip("/")
        self.range = self.headers.get("Range")
        self.close_connection = True
        faults = self.server.faults.get(self.name, [])
        self.server.requests.append(self)
        if faults:
            faults.pop(0)(self)
        else:
            self.send_file()

    def send_file(self, missing: int = 0, stop_after: int | None = None) -> None:
        """Announces `missing` bytes more than there are, and sends no more than `stop_after`."""
        body = self.server.files[self.name]
        start = int(self.range.removeprefix("bytes=").partition("-")[0]) if self.range else 0
        total = len(body) + missing
        if start >= total:
            self.send(416, b"", f"Content-Range: bytes */{total}")
            return
        extra = f"Content-Range: bytes {start}-{total - 1}/{total}" if self.range else ""
        self.send(206 if self.range else 200, body[start:][:stop_after], extra, total - start)

    def send(self, status: int, body: bytes, extra: str = "", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if extra:
            self.send_header(*extra.split(": "))
        self.end_headers()
        self.wfile.write(body)
        self.sent = len(body)

    def log_message(self, *args: object) -> None:
        pass


def refuse(handler: Handler) -> None:
    handler.send(403, b"<Error><Code>AccessDenied</Code></Error>", "Content-Type: application/xml")


def expire(handler: Handler) -> None:
    body = b"<Error><Message>Request has expired</Message></Error>"
    handler.send(403, body, "Content-Type: application/xml")


def show_page(handler: Handler) -> None:
    handler.send(200, b"<!DOCTYPE html><html>Please log in</html>", "Content-Type: text/html")


def show_untyped_page(handler: Handler) -> None:
    handler.send(200, b"<html>Please log in</html>")


def truncate(handler: Handler) -> None:
    handler.send_file(missing=100)


def drop(handler: Handler) -> None:
    handler.send_file(stop_after=2000)


def stall(handler: Handler) -> None:
    handler.send_file(stop_after=1)
    handler.wfile.flush()
    handler.server.released.wait(20)


def be_silent(handler: Handler) -> None:
    handler.server.released.wait(20)


def be_busy(handler: Handler) -> None:
    handler.send(503, b"")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = llama_2("llama-2-7b", 1)
        self.faults: dict[str, list[Callable[[Handler], None]]] = {}
        self.requests: list[Handler] = []
        self.released = threading.Event()

    def url(self, query: str = QUERY) -> str:
        return f"http://127.0.0.1:{self.server_port}/*?{query}"

    def requests_for(self, name: str) -> list[Handler]:
        return [request for request in self.requests if request.name == name]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def write_command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


class Downloader:
    """Runs the script in a folder of its own, with a PATH that holds only what it may use."""

    def __init__(self, home: Path, server: Server, tool: str) -> None:
        self.bin, self.dir, self.tmp = home / "bin", home / "my models", home / "tmp"
        self.server = server
        for folder in (self.bin, self.dir, self.tmp):
            folder.mkdir()
        for name in [*COMMANDS, "md5sum", *([tool] if tool else [])]:
            path = shutil.which(name)
            if path is None:
                pytest.skip(f"{name} isn't here")
            (self.bin / name).symlink_to(path)
        self.set_free_space(10**9)

    def set_free_space(self, kib: int) -> None:
        write_command(self.bin, "df", DF.format(free=kib))

    def env(self, **more: str) -> dict[str, str]:
        env = {"PATH": str(self.bin), "TMPDIR": str(self.tmp), "LLAMA_STALL_SECONDS": "1"}
        return env | {"LLAMA_URL": self.server.url(), "LLAMA_MODELS": "llama-2-7b"} | more

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT, *args],
            cwd=self.dir,
            env=self.env(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Where the tests run in the background, they ignore Ctrl-C, as would the script.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *args: str, answers: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SCRIPT, *args],
            cwd=self.dir,
            env=self.env(**env),
            input=answers,
            capture_output=True,
            text=True,
            timeout=25,
        )
        assert SECRET not in done.stdout + done.stderr
        assert list(self.tmp.iterdir()) == []
        assert not (self.dir / ".download.lock").exists()
        return done

    def succeed(self, *args: str, **kwargs: str) -> str:
        done = self.run(*args, **kwargs)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def fail(self, *args: str, status: int = 1, **kwargs: str) -> str:
        """The one line that a failing run says."""
        done = self.run(*args, **kwargs)
        assert done.returncode == status, done.stderr
        *questions, line = done.stderr.splitlines()
        assert line.startswith("download.sh: ")
        assert questions == [] or "answers" in kwargs
        return line

    def fail_at_shard(self, *faults: Callable[[Handler], None]) -> str:
        """The message of a run in which the shard has faults; it mustn't exist afterwards."""
        self.put_all_but_the_shard()
        self.server.faults[SHARD] = list(faults)
        line = self.fail()
        assert line.startswith(f"download.sh: {SHARD}: ")
        assert not self.path(SHARD).exists()
        return line

    def path(self, name: str) -> Path:
        return self.dir / name

    def put(self, name: str, body: bytes) -> None:
        self.path(name).parent.mkdir(exist_ok=True)
        self.path(name).write_bytes(body)

    def put_all_but_the_shard(self) -> None:
        for name in self.server.files.keys() - {SHARD}:
            self.put(name, self.server.files[name])

    def part(self) -> bytes | None:
        part = self.path(SHARD + ".part")
        return part.read_bytes() if part.exists() else None

    def assert_complete(self) -> None:
        files = [path for path in self.dir.rglob("*") if path.is_file()]
        found = {str(path.relative_to(self.dir)): path.read_bytes() for path in files}
        assert found == self.server.files


@pytest.fixture(params=["curl", "wget"])
def downloader(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Downloader:
    return Downloader(tmp_path, server, request.param)


@pytest.fixture
def script(tmp_path: Path, server: Server) -> Downloader:
    """For what is decided before the first request: no tool makes a difference."""
    return Downloader(tmp_path, server, "curl")


# What works


def test_every_shard_arrives_and_a_second_run_fetches_nothing(downloader, server):
    server.files = llama_2("llama-2-70b-chat", 8)
    downloader.succeed(LLAMA_MODELS="llama-2-70b-chat")
    downloader.assert_complete()
    assert len(server.requests) == len(server.files)
    downloader.succeed(LLAMA_MODELS="llama-2-70b-chat")
    assert len(server.requests) == len(server.files)


def test_code_llama_has_a_tokenizer_in_each_folder(script, server):
    server.files = code_llama("CodeLlama-34b-Python", 4)
    script.succeed("--family", "codellama", "--models", "34B-python")
    script.assert_complete()


def test_llama_3_has_a_policy_without_an_ending(script, server):
    """A failure means that Llama 3's files aren't where Meta's own script finds them."""
    server.files = llama_3("8b_instruction_tuned", 1, "LICENSE", "USE_POLICY")
    script.succeed("--family", "llama-3", "--models", "8B-instruct")
    script.assert_complete()
    assert "good      8b_instruction_tuned/tokenizer.model" in script.succeed("--verify", ".")


def test_later_llama_3_has_nothing_beside_its_folders(downloader, server):
    """A failure means that a run ends with a refusal of a file that was never there."""
    server.files = llama_3("Llama-3.1-405B-MP16", 16)
    downloader.succeed("--family", "Llama-3.1", "--models", "405b-mp16")
    downloader.assert_complete()
    assert len(server.requests) == 19
    server.files |= llama_3("Llama-3.1-8B-Instruct", 1)
    downloader.succeed("--models", "Llama-3.1-405B-MP16,llama-3.1-8b-instruct")
    downloader.assert_complete()


@pytest.mark.parametrize(
    ("family", "short", "folder"),
    [
        ("Llama-3", "8B", "8b_pre_trained"),
        ("llama-3", "70b-Instruct", "70b_instruction_tuned"),
        ("llama-3.1", "70B-instruct", "Llama-3.1-70B-Instruct"),
        ("Llama-3.2", "1b", "Llama-3.2-1B"),
        ("llama-3.3", "70B-Instruct", "Llama-3.3-70B-Instruct"),
    ],
)
def test_short_names_are_those_of_metas_scripts(script, family, short, folder):
    """A failure means that a model is asked for by its size and isn't found."""
    out = script.succeed("--dry-run", "--family", family, "--models", short)
    assert set(re.findall(r"(\S+)/params.json", out)) == {folder}


def test_folders_and_files_of_llama_3_are_metas(script):
    """A failure means that a folder or a file is asked for that Meta's server doesn't have."""
    sku_list = pytest.importorskip("llama_models.sku_list")
    sizes = pytest.importorskip("llama_models.sku_types").CheckpointQuantizationFormat
    named = script.succeed("--list")
    found = 0
    for model in sku_list.all_registered_models():
        folder = sku_list.llama_meta_net_info(model).folder
        is_text = "vision" not in model.core_model_id.value.lower()
        is_later = re.match(r"llama3_[123]$", model.model_family.value)
        if not (is_later and is_text and model.quantization_format == sizes.bf16):
            continue
        assert re.search(rf"^{folder} ", named, re.MULTILINE), folder
        out = script.succeed("--dry-run", LLAMA_MODELS=folder)
        files = set(re.findall(rf"{folder}/(\S+)", out))
        assert files == set(sku_list.llama_meta_net_info(model).files)
        size = sku_list.llama_meta_net_info(model).pth_size  # known of the largest alone
        if size:
            assert re.search(rf"{size / 1e9:.1f} GB  {folder}/consolidated.00.pth", out)
        found += 1
    assert found == 13
    assert len(re.findall(r"^Llama-3\.", named, re.MULTILINE)) == found


def test_dir_is_made_where_it_is_missing(script):
    script.succeed("--dir", "-new/inner folder")
    assert script.path(f"-new/inner folder/{SHARD}").exists()


def test_partial_file_is_resumed_by_a_request_for_the_rest(downloader, server):
    whole = server.files[SHARD]
    downloader.put_all_but_the_shard()
    downloader.put(SHARD + ".part", whole[:3000])
    downloader.succeed()
    downloader.assert_complete()
    (request,) = server.requests_for(SHARD)
    assert (request.range, request.sent) == ("bytes=3000-", len(whole) - 3000)


def test_connection_that_drops_once_is_resumed_within_the_run(downloader, server):
    downloader.put_all_but_the_shard()
    server.faults[SHARD] = [drop]
    downloader.succeed()
    downloader.assert_complete()
    assert [request.range for request in server.requests_for(SHARD)] == [None, "bytes=2000-"]


def test_complete_part_of_an_interrupted_run_is_only_verified(downloader, server):
    downloader.put_all_but_the_shard()
    downloader.put(SHARD + ".part", server.files[SHARD])
    downloader.succeed()
    downloader.assert_complete()


def test_partial_file_of_another_tool_is_resumed(downloader, server):
    downloader.put_all_but_the_shard()
    downloader.put(SHARD, server.files[SHARD][:3000])
    downloader.succeed()
    downloader.assert_complete()
    assert server.requests_for(SHARD)[0].range == "bytes=3000-"


def test_url_with_spaces_and_ampersands_arrives_unchanged(downloader, server):
    downloader.succeed(LLAMA_URL=f"  {server.url()}\r\n")
    assert {request.query for request in server.requests} == {QUERY.replace(" ", "%20")}


def test_bsd_md5_serves_where_md5sum_is_missing(script, server):
    (script.bin / "md5sum").unlink()
    tools = {name: shutil.which(name) for name in ("md5sum", "cut")}
    write_command(script.bin, "md5", BSD_MD5.format(**tools))
    script.succeed()
    script.assert_complete()
    script.put(SHARD, b"damaged")
    assert "1 file(s)" in script.fail("--verify", ".")


def test_answers_are_read_from_standard_input(script, server):
    answers = f"{server.url()}\nllama-2\n7b\n"
    done = script.run(LLAMA_URL="", LLAMA_MODELS="", answers=answers)
    assert done.returncode == 0, done.stderr
    script.assert_complete()


def test_enter_chooses_all_models_of_the_family_and_no_other(script):
    done = script.run("--dry-run", LLAMA_MODELS="", answers="llama-2\n\n")
    folders = set(re.findall(r"(\S+)/params.json", done.stdout))
    sizes = ("7b", "13b", "70b")
    assert folders == {f"llama-2-{size}{chat}" for size in sizes for chat in ("", "-chat")}
    assert "354.9 GB  in 38 file(s)" in done.stdout


# What goes wrong on the way


def test_refused_link_asks_for_a_new_one(downloader):
    assert "(403)" in downloader.fail_at_shard(refuse, refuse)
    assert downloader.part() is None


def test_link_refused_halfway_keeps_what_arrived(downloader, server):
    assert "(403)" in downloader.fail_at_shard(drop, refuse, refuse)
    assert downloader.part() == server.files[SHARD][:2000]


def test_expired_link_is_told_from_a_refused_one(downloader):
    assert "expired" in downloader.fail_at_shard(expire, expire)
    assert downloader.part() is None


@pytest.mark.parametrize("page", [show_page, show_untyped_page])
def test_web_page_with_status_200_is_no_file(downloader, page):
    assert "web page" in downloader.fail_at_shard(page)
    assert downloader.part() is None


def test_web_page_in_answer_to_a_resume_leaves_the_part_alone(downloader, server):
    downloader.put(SHARD + ".part", server.files[SHARD][:3000])
    assert "web page" in downloader.fail_at_shard(show_page)
    assert downloader.part() == server.files[SHARD][:3000]


def test_web_page_in_place_of_a_file_without_checksum_is_no_file(downloader, server):
    server.faults["LICENSE"] = [show_page]
    assert "web page" in downloader.fail()
    assert list(downloader.dir.iterdir()) == []


def test_truncated_file_is_kept_for_the_next_run(downloader, server):
    assert "before the end" in downloader.fail_at_shard(*[truncate] * 10)
    assert downloader.part() == server.files[SHARD]
    server.faults.clear()
    downloader.succeed()
    downloader.assert_complete()


@pytest.mark.slow
def test_stalled_server_is_left_after_the_configured_seconds(downloader, server):
    assert "no data for 1 seconds" in downloader.fail_at_shard(stall, *[be_silent] * 5)
    assert downloader.part() == server.files[SHARD][:1]


def test_busy_server_is_asked_again_while_patience_lasts(downloader, server):
    assert "503" in downloader.fail_at_shard(*[be_busy] * 10)
    server.faults[SHARD] = [be_busy]
    downloader.succeed(LLAMA_STALL_SECONDS="5")
    downloader.assert_complete()


def test_unreachable_server_says_check_the_network(downloader):
    assert "can't connect" in downloader.fail(LLAMA_URL="http://127.0.0.1:9/*?" + QUERY)


def test_wrong_checksum_removes_the_file_and_the_next_run_starts_from_nothing(downloader, server):
    good = server.files[SHARD]
    server.files[SHARD] = good[::-1]
    assert "wrong MD5" in downloader.fail_at_shard()
    assert downloader.part() is None
    server.files[SHARD] = good
    downloader.succeed()
    downloader.assert_complete()


def test_checklist_that_lacks_a_file_stops_the_run(downloader, server):
    server.files["llama-2-7b/checklist.chk"] = b"not a checklist\n"
    assert "not listed in llama-2-7b/checklist.chk" in downloader.fail()
    assert server.requests_for("llama-2-7b/params.json") == []


def test_full_disk_is_found_before_the_first_request(downloader, server):
    downloader.set_free_space(10**6)
    line = downloader.fail()
    assert "13.5 GB to fetch" in line
    assert "1.0 GB free" in line
    assert server.requests == []


def test_disk_that_fills_up_on_the_way_is_said(downloader):
    limited = f"trap '' XFSZ; ulimit -f 4; exec '{SCRIPT}'"
    done = subprocess.run(
        ["bash", "-c", limited],
        cwd=downloader.dir,
        env=downloader.env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "can't write to" in done.stderr
    assert not downloader.path("LICENSE").exists()


def test_folder_that_cannot_be_made_is_named(script):
    script.put("file", b"in the way")
    assert "can't make the folder file/models" in script.fail("--dir", "file/models")


def test_interrupt_keeps_the_part_and_leaves_no_litter(downloader, server):
    downloader.put_all_but_the_shard()
    server.faults[SHARD] = [stall]
    process = downloader.start(LLAMA_STALL_SECONDS="20")
    wait_until(lambda: downloader.part() is not None)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    server.released.set()
    downloader.succeed()
    downloader.assert_complete()


def test_second_run_at_the_same_time_is_turned_away(script, server):
    script.path(".download.lock").mkdir()
    process = script.start()
    _, error = process.communicate(timeout=5)
    assert process.returncode == 1
    assert "another download" in error
    assert script.path(".download.lock").exists()


def test_neither_curl_nor_wget_is_said(tmp_path, server):
    assert "neither curl nor GNU wget" in Downloader(tmp_path, server, "").fail()


# What goes wrong with the URL


MANGLED = {
    "https://l.facebook.com/l.php?u=https%3A%2F%2Fdownload.x.net%2F*%3FPolicy": "redirect",
    "https://eur01.safelinks.protection.outlook.com/?url=https%3A%2F%2Fx.net%2F*": "redirect",
    "https://urldefense.com/v3/__https://download.x.net/*?Policy=a__;Kg!!": "redirect",
    "https://urldefense.proofpoint.com/v2/url?u=https-3A__download.x.net_*": "redirect",
    "https://download.x.net/?Policy=a": "no *",
    "download.x.net/*?Policy=a": "begin with https://",
    "https://download.x.net/*?Policy=a&amp;Signature=b": "&amp;",
    "https://download.x.net/*?Policy=a\nSignature=b": "lines",
}


@pytest.mark.parametrize(("url", "reason"), MANGLED.items())
def test_mangled_url_says_how_to_copy_it(script, url, reason):
    line = script.fail(LLAMA_URL=url, status=2)
    assert reason in line
    assert "copy the text" in line
    assert "Policy" not in line
    assert list(script.dir.iterdir()) == []


def test_no_url_and_nobody_to_ask(script):
    assert "LLAMA_URL" in script.fail(LLAMA_URL="", answers="", status=2)


def test_url_in_the_wrong_place_is_not_repeated(script, server):
    for args in ([server.url()], ["--models", server.url()], [f"--url={server.url()}"]):
        assert "127.0.0.1" not in script.fail(*args, status=2)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command_lines() -> str:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it ended meanwhile
            continue
    return "\n".join(lines)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_url_is_never_in_the_process_list(downloader, server):
    downloader.put_all_but_the_shard()
    server.faults[SHARD] = [stall]
    process = downloader.start("--url", server.url(), LLAMA_URL="", LLAMA_STALL_SECONDS="20")
    wait_until(lambda: downloader.part() is not None)
    lines = command_lines()
    server.released.set()
    output = "".join(process.communicate(timeout=20))
    assert "download.sh" in lines
    assert f"{SHARD}.part" in lines
    assert SECRET not in lines
    assert SECRET not in output
    downloader.assert_complete()


def on_terminal(downloader: Downloader, typed: str, **env: str) -> str:
    """What a run on a terminal shows while `typed` is entered."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [SCRIPT],
        cwd=downloader.dir,
        env=downloader.env(TERM="xterm", **env),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        shown += chunk
        if typed and b"e-mail" in shown:
            threading.Thread(target=os.write, args=(master, typed.encode())).start()
            typed = ""
    process.wait(timeout=10)
    os.close(master)
    return shown.decode(errors="replace")


def test_typed_url_longer_than_a_terminal_line_arrives_whole(script, server):
    query = "Policy=" + "p" * 5000
    on_terminal(script, server.url(query) + "\n", LLAMA_URL="")
    assert {request.query for request in server.requests} == {query}
    script.assert_complete()


def test_terminal_shows_progress_but_not_the_url(downloader, server):
    shown = on_terminal(downloader, "")
    assert "100" in shown
    assert SECRET not in shown
    downloader.assert_complete()


def test_terminal_shows_a_refusal_but_not_the_url(downloader, server):
    server.faults["LICENSE"] = [refuse, refuse]
    shown = on_terminal(downloader, "")
    assert "refuses the link (403)" in shown
    assert SECRET not in shown


# Without a download


def test_list_names_each_model_with_its_size(script):
    sizes = dict(re.findall(r"^(\S+) +([\d.]+ GB)", script.succeed("--list"), re.MULTILINE))
    assert len(sizes) == 6 + 12 + 4 + 13
    assert sizes["llama-2-7b"] == "13.5 GB"
    assert sizes["llama-2-70b-chat"] == "138.0 GB"
    assert sizes["CodeLlama-34b-Instruct"] == "67.5 GB"
    assert sizes["70b_pre_trained"] == "141.1 GB"
    assert sizes["Llama-3.2-3B"] == "6.4 GB"


def test_dry_run_names_what_is_missing_and_touches_nothing(script, server):
    script.put("LICENSE", b"kept")
    out = script.succeed("--dry-run", "--url", server.url())
    assert f"13.5 GB  {SHARD}" in out
    assert "LICENSE" not in out
    assert "13.5 GB  in 6 file(s)" in out
    assert server.requests == []
    assert [path.name for path in script.dir.iterdir()] == ["LICENSE"]


def test_verify_finds_the_damaged_and_the_missing(script, server):
    script.put_all_but_the_shard()
    script.put(SHARD, server.files[SHARD])
    assert "good      " + SHARD in script.succeed("--verify", str(script.dir))
    script.put(SHARD, b"damaged")
    script.path("llama-2-7b/params.json").unlink()
    done = script.run("--verify", str(script.dir))
    assert done.returncode == 1
    assert "damaged   " + SHARD in done.stdout
    assert "missing   llama-2-7b/params.json" in done.stdout
    assert "2 file(s) not good" in done.stderr


def test_verify_without_a_checklist_trusts_nothing(script, server):
    script.put_all_but_the_shard()
    script.put(SHARD, server.files[SHARD])
    script.path("llama-2-7b/checklist.chk").unlink()
    done = script.run("--verify", ".")
    assert done.returncode == 1
    assert "unlisted  " + SHARD in done.stdout


def test_verify_of_a_folder_without_models_fails(script):
    assert "no model in" in script.fail("--verify", ".")


def test_help_names_every_option_and_variable(script):
    out = script.succeed("--help")
    text = SCRIPT.read_text()
    names = set(re.findall(r"LLAMA_[A-Z_]+", text)) | set(re.findall(r"^ +(--[a-z-]+)\)", text))
    assert {name for name in names if name not in out} == set()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--models", "llama-2-8b"], "unknown model 'llama-2-8b'"),
        (["--models", "7B"], "need --family"),
        (["--models", "llama-2-7b,CodeLlama-7b"], "a URL covers one family"),
        (["--models", "all"], "which family"),
        (["--models", ","], "no model"),
        (["--family", "llama-4"], "unknown family"),
        (["--models", "Llama-3.1-8B,Llama-3.2-1B"], "a URL covers one family"),
        (["--models", "8b_pre_trained,Llama-3.1-8B"], "a URL covers one family"),
        (["--fast"], "unknown option '--fast'"),
        (["--models"], "needs a value"),
    ],
)
def test_wrong_argument_is_one_line_and_status_2(script, args, reason):
    assert reason in script.fail(*args, status=2)


def test_stall_seconds_that_are_no_number_are_refused(script):
    for seconds in ("0", "1.5", "soon"):
        assert "LLAMA_STALL_SECONDS" in script.fail(LLAMA_STALL_SECONDS=seconds, status=2)


# The text of the script


def test_shellcheck_has_no_warning():
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=here)
    if shellcheck is None:
        pytest.skip("shellcheck isn't here")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.stdout == ""


def test_nothing_newer_than_bash_3_2_is_used():
    newer = r"(declare|local) -[Agn]|mapfile|readarray|coproc|\$\{\w+[,^@]|\|&|&>>|wait -n|;;&"
    assert re.findall(newer, SCRIPT.read_text()) == []
