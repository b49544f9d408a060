"""The command line: every spelling of a setting, and an error for whatever cannot be carried out."""

import subprocess
import sys
from pathlib import Path

import pytest

from craft_opt.bridge import cli
from craft_opt.bridge.cli import UsageError, read_command
from craft_opt.bridge.flags import check_names

TRAIN = ["--policy.path=p", "--dataset.repo_id=d"]


def test_every_spelling_means_the_same():
    spaced = ["--craft.enabled=true", "--craft.retention_mode", "hidden", "--craft.lambda_lr", "0.5"]
    spaced += ["--craft.conflict_threshold", "-0.2"]
    commands = [
        [*TRAIN, "--retention-mode", "hidden", "--craft.lambda_lr=0.5", "--craft.conflict_threshold=-0.2"],
        [*TRAIN, "--retention-mode=hidden", "craft.lambda_lr=0.5", "craft.conflict_threshold=-0.2"],
        [*TRAIN, *spaced],
        [
            *TRAIN,
            "--retention_mode=hidden",
            "craft.enabled=True",
            "craft.lambda_lr=.5",
            "craft.conflict_threshold=-2e-1",
        ],
    ]
    expected = {"enabled": True, "retention_mode": "hidden", "lambda_lr": 0.5, "conflict_threshold": -0.2}
    for command in commands:
        assert read_command(command).craft == expected


def test_none_switches_retention_off():
    command = read_command([*TRAIN, "--retention-mode=none"])
    assert command.craft == {"enabled": False}
    assert command.retention_mode == "none"


def test_the_reports_dry_run_arguments_are_read_as_written():
    report = (
        "--dataset.repo_id=lerobot/aloha_sim_insertion_human --policy.path=lerobot/pi0_fast "
        "--output_dir=outputs/craft_hidden_test --steps=3 --batch_size=2 --eval_freq=0 --log_freq=1 "
        "--save_checkpoint=false --num_workers=0 --wandb.enable=false craft.enabled=true "
        "craft.retention_mode=hidden craft.anchor_cache_dir=data/anchor_hidden_cache craft.anchor_batch_size=2 "
        "craft.retention_freq=1"
    )
    command = read_command(report.split())
    check_names(command.flags)
    assert command.kind == "train"
    assert command.flags["env_eval_freq"] == "0"
    assert command.craft == {
        "enabled": True,
        "retention_mode": "hidden",
        "anchor_cache_dir": "data/anchor_hidden_cache",
        "anchor_batch_size": 2,
        "retention_freq": 1,
    }


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--retention-mode", "hidden"], "quickstart"),
        (["--retention-mode", "none", "--seed=3", "--steps", "5", "--output_dir=x", "--dry-run"], "quickstart"),
        (["--retention-mode", "hidden", "--craft.lambda_lr=0"], "quickstart"),
        (["--retention-mode", "token_ce"], "quickstart"),
        (TRAIN, "train"),
        (["--config_path=c.yaml"], "train"),
        (["--resume=true", "--config_path=c.json"], "train"),
        (["--help"], "help"),
        ([*TRAIN, "-h"], "help"),
    ],
)
def test_what_is_asked_for(argv, kind):
    assert read_command(argv).kind == kind


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        # unknown
        ([*TRAIN, "--craft.lamda_lr=1"], "unknown flag --craft.lamda_lr; did you mean --craft.lambda_lr?"),
        ([*TRAIN, "craft.anchor_cache=x"], "unknown flag --craft.anchor_cache; did you mean --craft.anchor_cache_dir?"),
        (["--retention-mod", "hidden"], "unknown flag --retention-mod; did you mean --retention-mode?"),
        (["--retention-mode", "hidden", "--batch_size=4"], "unknown flag --batch_size"),
        ([*TRAIN, "steps=3"], "unknown argument 'steps=3'; did you mean --steps=3"),
        ([*TRAIN, "-n", "3"], "unknown argument '-n'"),
        ([*TRAIN, "--steps"], "--steps needs a value"),
        ([*TRAIN, "--steps", "--seed=3"], "--steps needs a value"),
        # contradictory
        ([*TRAIN, "--steps=3", "--steps=4"], "--steps is given twice, as '3' and as '4'"),
        ([*TRAIN, "--eval_freq=3", "--env_eval_freq=4"], "given twice, as '3' and as '4'"),
        ([*TRAIN, "--retention-mode=none", "--craft.enabled=true"], "contradictory flags: --retention-mode none"),
        ([*TRAIN, "--retention-mode=hidden", "craft.enabled=false"], "means craft.enabled=true"),
        ([*TRAIN, "--retention-mode=hidden", "craft.retention_mode=token_ce"], "means craft.retention_mode=hidden"),
        ([*TRAIN, "--retention-mode=none", "craft.retention_mode=hidden"], "switches retention off"),
        ([*TRAIN, "craft.epsilon=auto", "craft.epsilon_end=0.1"], "--craft.epsilon=auto measures what"),
        ([*TRAIN, "--policy.type=act"], "--policy.path brings its type"),
        ([*TRAIN, "--resume=true", "--config_path=c"], "--resume=true takes the policy of the checkpoint"),
        (["--resume=true", "--config_path=c", "--dry-run"], "--dry-run writes no checkpoint and --resume=true"),
        ([*TRAIN, "--dry-run", "--save_checkpoint=true"], "--dry-run writes no checkpoint"),
        ([*TRAIN, "--scheduler.type=diffuser"], "--scheduler.* has no effect beside the policy's preset"),
        (["--retention-mode=hidden", "--craft.anchor_cache_dir=x"], "the quickstart builds its own anchor cache"),
        # incomplete
        ([], "no flags: say --retention-mode hidden"),
        (["--seed=3"], "no training was asked for"),
        (["--resume=true"], "--resume=true needs --config_path="),
        (["--policy.path=p"], "training needs a dataset"),
        (["--dataset.repo_id=d"], "training needs a policy"),
        # values
        (["--retention-mode=all"], "--retention-mode must be one of hidden, token_ce, none, got 'all'"),
        (["--retention-mode=hidden", "--steps=0"], "--steps must be a whole number above 0, got '0'"),
        (["--retention-mode=hidden", "--seed=x"], "--seed must be a whole number, got 'x'"),
        ([*TRAIN, "--dry-run=maybe"], "--dry_run must be true or false, got 'maybe'"),
        ([*TRAIN, "--craft.enabled=yes"], "--craft.enabled must be true or false, got 'yes'"),
        ([*TRAIN, "--craft.anchor_batch_size=2.5"], "--craft.anchor_batch_size must be a whole number, got '2.5'"),
        ([*TRAIN, "--craft.lambda_lr=big"], "--craft.lambda_lr must be a number, got 'big'"),
        ([*TRAIN, "--craft.conflict_threshold=-1.5"], "craft.conflict_threshold must be in [-1, 1], got -1.5"),
        ([*TRAIN, "--craft.lambda_lr=-0.1"], "craft.lambda_lr must be finite and at least 0, got -0.1"),
        ([*TRAIN, "--craft.lambda_max=nan"], "craft.lambda_max must be finite and at least 0, got nan"),
        ([*TRAIN, "--craft.initial_lambda=11"], "craft.initial_lambda must be in [0, lambda_max = 10], got 11.0"),
        ([*TRAIN, "--craft.anchor_batch_size=0"], "craft.anchor_batch_size must be finite and at least 1, got 0"),
        ([*TRAIN, "--craft.retention_freq=0"], "craft.retention_freq must be finite and at least 1, got 0"),
        ([*TRAIN, "--craft.projection_mode=sum"], "craft.projection_mode must be one of weighted, equal"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(argv, message):
    with pytest.raises(UsageError) as error:
        read_command(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz=3"], "unknown flag --stepz; did you mean --steps?"),
        (["--step=3"], "unknown flag --step; did you mean --steps?"),
        (["--policy.optimizer_lrr=1"], "did you mean --policy.optimizer_lr?"),
        (["--dataset.repoid=x"], "did you mean --dataset.repo_id?"),
        (["--wandb.enabled=false"], "did you mean --wandb.enable?"),
        (["--optimizer.type=adamw", "--optimizer.moment=1"], "unknown flag --optimizer.moment"),
        (["--normalisation_stats=teacher"], "did you mean --normalization_stats?"),
        (["--policy.width=3"], "unknown flag --policy.width"),
    ],
)
def test_unknown_lerobot_flags_name_the_closest_known(flags, message):
    command = read_command(["--policy.type=pi0_fast", "--dataset.repo_id=d", *flags])
    with pytest.raises(UsageError) as error:
        check_names(command.flags)
    assert message in str(error.value)


def test_an_unknown_policy_type_is_refused():
    with pytest.raises(UsageError, match=r"--policy.type must be one of .*pi0_fast.*, got 'pi0fast'"):
        check_names({"policy.type": "pi0fast"})


def test_flags_of_the_saved_policys_own_type_are_known(world):
    check_names({"policy.path": str(world.teacher), "policy.width": "32", "policy.device": "cpu"})
    with pytest.raises(UsageError, match=r"unknown flag --policy\.vision_backbone"):
        check_names({"policy.path": str(world.teacher), "policy.vision_backbone": "x"})


def test_help_names_every_setting(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in cli._CRAFT_FIELDS:
        assert f"craft.{name} " in shown


def test_flag_errors_come_before_lerobot_is_imported():
    code = (
        "import sys; from craft_opt.bridge.cli import main; code = main(sys.argv[1:]); "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('lerobot', 'transformers')]; sys.exit(code)"
    )
    argv = ["--policy.path=p", "--dataset.repo_id=d", "--craft.conflict_threshold=3"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: craft.conflict_threshold must be in [-1, 1], got 3.0\n"
    assert done.stdout == ""


def test_the_door_is_the_command_line():
    door = Path(__file__).parents[2] / "train.py"
    done = subprocess.run([sys.executable, door, "--retention-mode", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --retention-mode must be one of")
