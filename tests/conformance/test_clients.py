"""Other makers' clients, unmodified, against a real server: `make conformance`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from checkout import ROOT
from servers.server_under_test import ServerUnderTest, start_server

from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir, find_gguf

HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("TURRET_CLIENTS", ROOT / ".conformance" / "bin"))
ASK = "JSON with name, age: Ann is 31 years old."
# A template with tool calls in the format of Hermes and Qwen.
TEMPLATE = """\
{% for tool in tools or [] %}{{ tool | tojson }}<tool_call>
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NOTHING: Mapping[str, str] = {}

pytestmark = pytest.mark.long
needs_clients = pytest.mark.skipif(
    not (CLIENTS / "python").exists(), reason="make conformance installs the clients"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    flags = ["--http-address", "127.0.0.1:0", "--adapter-root", str(ROOT / "examples/adapters")]
    for name in ("sql", "json"):
        flags += ["--preload", f"{name}={name}"]
    with start_server(tmp_path_factory.mktemp("conformance"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: ServerUnderTest) -> str:
    return f"http://{server.http_address}/v1"


@pytest.fixture(scope="module")
def tools_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on the bundled model, with a template that supports tools."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("tools")
    gguf = find_gguf()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
    )
    model.save_pretrained(folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    flags = ["--http-address", "127.0.0.1:0", "--model", str(folder / "model")]
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    with start_server(folder, *flags, environment=environment) as running:
        yield f"http://{running.http_address}/v1"


def expected(url: str, model: str = "json", **more: Any) -> str:
    """The results of OpenAI's Python client, which tests/http tests."""
    with openai.OpenAI(base_url=url, api_key="none") as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": ASK}],
            temperature=0,
            max_tokens=6,
            extra_body=more,
        )
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def run(
    command: Sequence[str | Path], cwd: Path | None = None, environment: Mapping[str, str] = NOTHING
) -> str:
    """The output of a command, which must end with exit code 0."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "OPENAI_API_KEY": "none", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a script of ``node/``; returns the JSON that it prints."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for path in (HERE / "node").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
    return lambda *arguments: json.loads(run(["node", *arguments], folder))


def test_openai_for_node(url: str, node: Callable[..., Any]) -> None:
    found = node("openai.mjs", url)
    text = expected(url)
    assert found["models"][1:] == ["json", "sql"]
    assert [found[name] for name in ("whole", "stream", "helped", "response")] == [text] * 4
    assert found["logprobs"] == found["usage"] == 6
    assert found["kinds"][0] == "response.created"
    assert found["kinds"][-1] == "response.incomplete"
    assert found["refusal"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}


def test_vercel_for_node(url: str, tools_url: str, node: Callable[..., Any]) -> None:
    found = node("vercel.mjs", url, tools_url)
    text = expected(url)
    assert (found["whole"], found["stream"]) == (text, text)
    assert found["usage"] == found["streamUsage"] == 6
    assert found["reason"] == "length"
    assert (found["age"], found["vectors"]) == ("number", 2)
    # A forced tool is called once, and the answer has no text other than the call.
    assert found["call"] == [["double", "number"]]
    assert found["result"] == [True]
    assert found["text"] == ""
    assert {"tool-call", "tool-result"} <= {*found["kinds"]}
    assert not {"error", "text-delta"} & {*found["kinds"]}
    assert found["refusal"] == {"name": "AI_APICallError", "status": 404}


def test_grpc_for_node(server: ServerUnderTest, url: str, node: Callable[..., Any]) -> None:
    found = node("grpc.mjs", server.address, str(ROOT / "proto"))
    text = expected(url)
    assert found == {
        **{"whole": text, "gzip": text, "stream": text, "usage": 6, "vectors": 2},
        "missing": {"code": "NOT_FOUND", "details": 1},
        "late": {"code": "DEADLINE_EXCEEDED", "details": 0},
    }


def test_grpc_for_go(server: ServerUnderTest, url: str, tmp_path: Path) -> None:
    """The Go modules are Debian's, and protoc generates the code of the API."""
    tools = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    library = Path("/usr/share/gocode")
    if any(shutil.which(tool) is None for tool in tools) or not library.is_dir():
        pytest.skip("needs golang-go, golang-google-grpc-dev, protoc-gen-go and protoc-gen-go-grpc")
    source = tmp_path / "src"
    shutil.copytree(HERE / "go", source / "ask")
    protos = (ROOT / "proto" / "turret" / "v1").glob("*.proto")
    outputs = [f"--go_out={source}", f"--go-grpc_out={source}"]
    run(["protoc", f"-I{ROOT / 'proto'}", *outputs, *protos])
    environment = {"GO111MODULE": "off", "GOPATH": f"{tmp_path}:{library}"}
    command = ["go", "run", "main.go", server.address, ASK]
    found = json.loads(run(command, source / "ask", environment))
    text = expected(url)
    assert found == {
        **{"whole": text, "stream": text, "usage": 6},
        **{"missing": True, "details": 1, "late": True},
    }


@needs_clients
def test_llama_index(url: str, tools_url: str) -> None:
    found = json.loads(run(script("ask_llama_index.py", url, tools_url, ASK)))
    text = expected(url)
    assert (found["whole"], found["stream"]) == (text, text)
    assert found["completion"] == found["streamed"] != ""
    assert found["age"] == "int"
    assert found["tool"] == ["double", "int"]
    assert found["vectors"] == 2


@needs_clients
def test_guidellm(url: str, tmp_path: Path) -> None:
    """GuideLLM asks for the usage after every chunk, from which it counts tokens."""
    report = tmp_path / "report.json"
    command = script(
        *("ask_guidellm.py", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model=json"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"),
        *("--tokenizer", f"kind=hf_auto,model={_tokenizer()}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--output", f"kind=json,path={report}"),
    )
    packages = str(Path(torch.__file__).parents[1])
    run(command, environment={"TORCH_AT": packages, "HF_HUB_OFFLINE": "1"})
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"]["successful"] == metrics["request_totals"]["total"] == 3
    counts = metrics["output_token_count"]["successful"]
    assert (counts["min"], counts["max"]) == (8.0, 8.0)
    for request in benchmark["requests"]["successful"]:
        # A chunk has several tokens where speculation guessed right.
        assert 1 < request["info"]["timings"]["token_iterations"] <= 8


@needs_clients
def test_langchain(url: str) -> None:
    script = HERE / "ask_langchain.py"
    found = json.loads(run([CLIENTS / "python", script, url, ASK]))
    text = expected(url)
    assert (found["whole"], found["stream"], found["batch"]) == (text, text, [text, text])
    assert found["usage"] == 6
    assert found["mixed"] == expected(url, "json+sql*-0.5")
    assert found["completion"]


@needs_clients
def test_llm(url: str, tmp_path: Path) -> None:
    models = [{"model_id": "t", "model_name": "json", "api_base": url}]
    # YAML is a superset of JSON.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    options = ["-m", "t", "-o", "temperature", "0", "-o", "max_tokens", "6"]
    for more in ([], ["--no-stream"]):
        command = [CLIENTS / "llm", *options, *more, ASK]
        said = run(command, environment={"LLM_USER_PATH": str(tmp_path)})
        assert said.strip() == expected(url).strip()


@needs_clients
@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_lm_eval(tokenizer: str, url: str, tmp_path: Path) -> None:
    """The harness scores choices by echo and prompt logprobs, with the server's own tokens."""
    task = (HERE / "tasks" / "colours.yaml").read_text()
    questions = HERE / "tasks" / "colours.jsonl"
    (tmp_path / "colours.yaml").write_text(task.replace("COLOURS_JSONL", str(questions)))
    arguments = f"model=base,base_url={url}/completions,num_concurrent=2,max_retries=1"
    arguments += f",tokenizer_backend={tokenizer},tokenized_requests=True"
    if tokenizer == "huggingface":
        arguments += f",tokenizer={_tokenizer()}"
    command = [CLIENTS / "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--include_path", tmp_path, "--tasks", "colours", "--output_path", tmp_path / "out"]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run(command, environment=quiet)
    (report,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(report.read_text())["results"]["colours"]
    assert scores["acc,none"] == 1.0


@needs_clients
@pytest.mark.parametrize(
    ("client", "expected_of"),
    [
        ("instructor", lambda found: found["TOOLS"] == found["JSON_SCHEMA"] == "int"),
        ("outlines", lambda found: found["age"] == "int" and found["choice"] in ("yes", "no")),
        (
            "guidance",
            lambda found: found["colour"] in ("red", "blue") and len(found["number"]) == 3,
        ),
        ("pydantic_ai", lambda found: found == {"age": "int"}),
        ("dspy", lambda found: bool(found["text"])),
    ],
)
def test_python_clients(
    client: str, expected_of: Callable[[Any], bool], url: str, tools_url: str
) -> None:
    found = ask(client, url, tools_url)
    assert expected_of(found), found


def test_the_lora_calls_of_vllm(url: str) -> None:
    """The requests are those in vLLM's documentation, with an absolute path."""

    def post(name: str, body: dict[str, Any]) -> int:
        head = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}/{name}", json.dumps(body).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    name = "acme/Pirate.v1"
    adapter = {"lora_name": name, "lora_path": str(ROOT / "examples/adapters/pirate")}
    assert post("load_lora_adapter", adapter) == 200
    assert expected(url, name) != expected(url, "base")
    other = {**adapter, "lora_path": str(ROOT / "examples/adapters/json")}
    assert post("load_lora_adapter", other) == 409
    assert post("load_lora_adapter", {**other, "load_inplace": True}) == 200
    assert expected(url, name) == expected(url, "json")
    assert post("unload_lora_adapter", {"lora_name": name, "lora_int_id": 1}) == 200
    assert post("unload_lora_adapter", {"lora_name": name}) == 404


@needs_clients
def test_litellm(url: str, tools_url: str) -> None:
    text = expected(url)
    found = ask("litellm", url, tools_url)
    assert found == {"whole": text, "stream": text, "effort": text, "vectors": 2}


@needs_clients
def test_openai_agents(url: str, tools_url: str) -> None:
    found = ask("agents", url, tools_url)
    doubled = [str(2 * number) for number in found.pop("calls")]
    assert len(doubled) == 2
    assert list(map(str, found.values())) == doubled


def ask(client: str, url: str, tools_url: str) -> Any:
    """The results of one of the clients in ``ask_clients.py``."""
    return json.loads(run([CLIENTS / "python", HERE / "ask_clients.py", client, url, tools_url]))


def script(name: str, *arguments: str) -> list[str | Path]:
    """The command for a script that names its packages; ``uv`` gives it its own environment."""
    python = CLIENTS / "python"
    return [CLIENTS / "uv", "run", "-q", "--python", python, "--script", HERE / name, *arguments]


def _tokenizer() -> Path:
    """The bundled model's tokenizer, as the server has put it into its cache."""
    return resolve_model(None, default_cache_dir()).files


@needs_clients
@pytest.mark.parametrize("form", ["openai-chat", "open-responses"])
def test_llm_comply(url: str, form: str) -> None:
    """Every check passes except for features that the bundled model lacks, which get a 400."""
    command = [CLIENTS / "llm-comply", "-u", url, "-k", "none", "-m", "json", "--format", form]
    # The exit code also counts unsupported features.
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=900)
    results = json.loads(result.stdout)["results"]
    by_status: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for check in results:
        name = check["id"].removeprefix("chat-")
        by_status[check["status"]].add(name)
        if check["status"] == "failed":
            assert check["errors"][0].startswith("HTTP 400"), check
    assert by_status["failed"] <= {"tool-calling", "image-input"}
    assert by_status["skipped"] <= {"reasoning-summary"}
    assert by_status["passed"] >= {
        *("basic-response", "system-prompt", "multi-turn", "error-handling"),
        *("streaming-response", "streaming-usage"),
    }


@needs_clients
def test_langchain_calls_tools(tools_url: str) -> None:
    found = json.loads(run([CLIENTS / "python", HERE / "ask_langchain_tools.py", tools_url]))
    for name in ("chat", "responses"):
        assert found[name]["tool"] == "double"
        assert isinstance(found[name]["arguments"]["number"], int)
        assert found[name]["has_end"]


@needs_clients
def test_anthropic(url: str, tools_url: str) -> None:
    """The client runs synchronously, asynchronously, with events, and in a loop of tool calls."""
    roots = [each.removesuffix("/v1") for each in (url, tools_url)]
    found = json.loads(run([CLIENTS / "python", HERE / "ask_anthropic.py", *roots, ASK]))
    text = expected(url)
    assert (found["whole"], found["stream"]) == (text, text)
    assert found["async"] == {"whole": text, "stream": text}
    assert (found["reason"], found["usage"]) == ("max_tokens", 6)
    assert found["ends"] == ["message_start", "message_stop"]
    assert found["count"] == found["prompt"]
    assert found["parsed"] == "int"
    assert found["refused"] == {
        "kind": "invalid_request_error",
        "param": "messages[0].content[0]",
    }
    assert found["loop"]["called"] == [["double", "int"]] * 2
    assert found["loop"]["last"] == "message_stop"


@needs_clients
def test_tinker_trains_as_the_page_shows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    page = (ROOT / "docs" / "tenants.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    # The client loads the tokenizer from a directory with the model's name, if there is one.
    name = program.split('model = "')[1].split('"')[0]
    gguf = find_gguf()
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(tmp_path / name)
    flags = ["--http-address", "127.0.0.1:0", "--training", "--state-dir", str(tmp_path / "state")]
    with start_server(tmp_path, *flags) as running:
        environment = {
            "TINKER_BASE_URL": f"http://{running.http_address}",
            "TINKER_API_KEY": "tml-none",
            "HF_HUB_OFFLINE": "1",
        }
        said = run([CLIENTS / "python", "-c", program], tmp_path, environment)
    *steps, answer = said.splitlines()
    losses = [float(line.split()[1]) for line in steps]
    assert len(losses) == 8
    assert losses[-1] < 0.01 * losses[0]
    assert answer.startswith(" Bastion")
