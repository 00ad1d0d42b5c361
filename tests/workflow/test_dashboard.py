"""One table of panels is in the docs and in the workspace at W&B, and it names metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF, DASHBOARD, compose_root
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.dashboard import PANELS, panels_markdown, save_dashboard, workspace
from tests.support.wandb_server import WandbServer
from tests.workflow.test_metric_names import listed

HAS_LIBRARY = importlib.util.find_spec("wandb_workspaces") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="wandb-workspaces is not installed (the extra `dashboard`)")
PAGE = CONF.parent / "docs" / "dashboards.md"


def dashboard(*overrides: str):
    return compose_root(DASHBOARD, list(overrides))


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_panels_of_the_docs_are_those_of_the_workspace() -> None:
    assert PAGE.read_text().endswith("\n\n" + panels_markdown())


def test_a_panel_shows_metrics_that_are_listed_and_no_other() -> None:
    """Words in capitals stand for any word: a panel's expression is tried on names that a training logs."""
    words = {"NAME": "forward_kl", "TEXT": "wiki", "POSITION": "14"}
    for panel in PANELS:
        for name in panel.metrics:
            logged = re.sub("[A-Z]+", lambda match: words[match[0]], name)
            assert any(pattern.fullmatch(logged) for pattern in listed()), name
            assert re.search(panel.regex, logged)
    shown = {panel.title: panel.regex for panel in PANELS}
    assert not re.search(shown["Held out"], "eval/wiki_kl_nats_from_14")
    assert not re.search(shown["KL by position"], "eval/wiki_kl_nats")
    assert not re.search(shown["Learning rate"], "train/lr_other") and not re.search(shown["Losses"], "train/loss_x")


def test_a_dry_run_says_what_would_be_saved_where(capsys: pytest.CaptureFixture[str]) -> None:
    save_dashboard(dashboard("wandb.entity=team", "wandb.project=p", "title=Mine", "dry_run=true"))
    told = capsys.readouterr().out
    assert "saves Mine to team/p" in told and panels_markdown() in told


def test_a_missing_library_or_login_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs wandb-workspaces; pip install 'compactlm-nemo\[dashboard\]'"):
            save_dashboard(dashboard())
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(ConfigError, match="needs a login at W&B; set WANDB_API_KEY"):
            save_dashboard(dashboard())
    with pytest.raises(ConfigError, match="title is empty"):
        dashboard("title=' '")


@needs_library
def test_the_workspace_has_every_panel_in_order() -> None:
    made = workspace("Mine", "team", "p")
    [section] = made.sections
    assert [(plot.title, plot.metric_regex, plot.x) for plot in section.panels] == [
        (panel.title, panel.regex, "Step") for panel in PANELS
    ]


@needs_library
def test_the_workspace_is_sent_to_the_project_and_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    save_dashboard(dashboard("wandb.project=p", "title=Mine"))
    [view] = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("e", "p", "Mine")
    panels = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"][0]["panels"]
    assert [panel["config"]["metricRegex"] for panel in panels] == [panel.regex for panel in PANELS]
    assert f"dashboard: {server.url}/e/p?nw=" in capsys.readouterr().out
    server.mood = "error"
    with pytest.raises(ConfigError, match="W&B does not take the dashboard for team/p .*look at wandb.entity") as error:
        save_dashboard(dashboard("wandb.entity=team", "wandb.project=p"))
    assert "\n" not in str(error.value)
    server.close()
