"""The commands against a real server, as a person or a script uses them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.harness import MODEL, QUESTION, Server


def test_run_prints_the_answer_and_nothing_else(server: Server) -> None:
    done = server.cli("run", MODEL, QUESTION, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n")
    assert done.stderr == ""


def test_run_json_has_text_usage_and_receipt(server: Server) -> None:
    answer = json.loads(server.succeed("run", MODEL, QUESTION, "--max-tokens", "8", "--json"))
    assert "Paris" in answer["text"]
    assert answer["usage"]["completion_tokens"] <= 8
    receipt = answer["receipt"]
    assert receipt["model_id"] == MODEL
    assert receipt["actual"]["prefill_s"] > 0
    assert receipt["ttft_s"] <= receipt["total_s"]


def test_run_reads_the_prompt_from_standard_input(server: Server) -> None:
    done = server.cli("run", MODEL, "-", "--max-tokens", "8", stdin=QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_run_of_an_unknown_model_names_the_deployed_ones(server: Server) -> None:
    done = server.cli("run", "nobody", QUESTION)
    assert done.returncode == 1
    assert done.stderr.startswith("flashserve: error: ")
    assert MODEL in done.stderr
    assert done.stderr.count("\n") == 1


def test_ps_lists_the_models(server: Server) -> None:
    heading, *rows = server.succeed("ps").splitlines()
    assert heading.split() == [
        "name",
        "state",
        "tier",
        "replicas",
        "in_flight",
        "dram_bytes",
        "leases",
        "last_used_s",
        "reason",
    ]
    assert any(row.startswith(MODEL) for row in rows)
    [model] = [m for m in json.loads(server.succeed("ps", "--json")) if m["name"] == MODEL]
    assert model["size_bytes"] == 269_060_552
    assert model["reason"]


def test_commands_work_over_a_url(server: Server) -> None:
    assert MODEL in server.succeed("ps", "--url", server.url)
    over_url = server.cli("deploy", "x", "/etc", "--url", server.url)
    assert over_url.returncode == 1
    assert "roots" in over_url.stderr


def test_stage_and_evict_move_the_bytes(server: Server, checkpoint: Path) -> None:
    name = "team/moved"
    server.succeed("deploy", name, str(checkpoint))
    assert server.model(name)["tier"] == "disk"
    staged = json.loads(server.succeed("stage", name, "--tier", "dram", "--json"))
    assert staged["tier"] == "dram"
    assert staged["dram_bytes"] >= staged["size_bytes"]
    evicted = json.loads(server.succeed("evict", name, "--tier", "dram", "--json"))
    assert (evicted["tier"], evicted["dram_bytes"]) == ("disk", 0)
    server.succeed("delete", name)
    assert name not in server.succeed("ps")


def test_the_tiers_say_what_they_hold(server: Server) -> None:
    server.succeed("stage", MODEL, "--tier", "dram")
    [node] = json.loads(server.succeed("ps", "--tiers", "--json"))
    dram, disk = node["tiers"]
    assert (dram["tier"], disk["tier"]) == ("dram", "disk")
    assert dram["used_bytes"] + dram["free_bytes"] == dram["total_bytes"]
    assert dram["num_models"] >= 1
    assert node["read_bytes"]["disk"] > 0
    heading, first, *_ = server.succeed("ps", "--tiers").splitlines()
    assert heading.split()[:2] == ["tier", "total_bytes"]
    assert first.startswith("dram")


def test_decisions_say_why(server: Server) -> None:
    with server.admin() as admin:
        decisions = admin.get("/admin/v1/decisions").json()["data"]
    assert decisions
    assert all(decision["reason"] for decision in decisions)


def test_bounds_are_shown_and_contradictions_refused(server: Server, checkpoint: Path) -> None:
    line = "daily 00:00-24:00 target=3"
    bounds = ("--max-replicas", "2", "--schedule", line, "--schedule", "sat 08:00-9:00 max=1")
    server.succeed("deploy", "bound", str(checkpoint), *bounds)
    model = server.model("bound")
    assert (model["min_replicas"], model["target"], model["schedule"][0]) == (0, 3, line)
    server.succeed("delete", "bound")
    for wrong in (("--min-replicas", "99"), ("--schedule", "mon 08:00-18:00 min=99")):
        done = server.cli("deploy", "bound", str(checkpoint), *wrong)
        assert done.returncode == 1
        error = done.stderr.splitlines()[-1]  # after the line that says what it does
        assert error.startswith("flashserve: error: ")
        assert "min_replicas is 99, above" in error
        assert "Traceback" not in done.stderr


def test_savings_say_what_the_models_took(server: Server) -> None:
    server.ask(max_tokens=2)
    report = json.loads(server.succeed("savings", "--days", "1", "--json"))
    [model] = [line for line in report["models"] if line["name"] == MODEL]
    assert model["requests"] >= 1
    assert model["busy_s"] > 0
    assert {other["policy"] for other in report["against"]} == {"always-on", "keep-alive-10m"}
    assert not report["broken"]
    assert "always-on" in server.succeed("savings")


def test_an_unknown_policy_is_refused_with_those_that_there_are(
    server: Server, tmp_path: Path
) -> None:
    for option, setting in (("--policy", "name"), ("--shadow", "shadow")):
        done = server.cli("serve", "--port", "0", "--data-dir", str(tmp_path), option, "seer")
        assert done.returncode == 1
        assert f"policy.{setting}: no policy is named 'seer'" in done.stderr
        assert "always-on" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_second_server_on_the_same_directory_is_refused(server: Server) -> None:
    done = server.cli("serve")
    assert done.returncode == 1
    assert str(server.pid) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2].rstrip("/")
    done = server.cli("serve", "--port", port, "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert port in done.stderr
    assert done.stderr.count("\n") == 1


def test_binding_beyond_this_machine_needs_keys(server: Server, tmp_path: Path) -> None:
    done = server.cli("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "api_keys" in done.stderr
