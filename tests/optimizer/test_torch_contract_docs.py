"""docs/optimizer-contract.md against the tests that it names: neither can drift from the other."""

import ast
import importlib.util
import pathlib
import re

from tests.support.rooms import ROOT

# The cases of torch's test_optim.py (TestOptimRenewed), which torch does not ship; read from that of torch 2.6.
TORCH_CASES = [
    "optim_infos_do_not_specify_global_cliquey_kwargs",
    "errors",
    "forloop_goes_right_direction",
    "forloop_goes_right_direction_multigpu",
    "param_group_with_lrscheduler_goes_right_direction",
    "tensor_lr",
    "rosenbrock_sparse",
    "complex",
    "complex_2d",
    "foreach_matches_forloop",
    "mixed_device_dtype",
    "set_default_dtype_works_with_foreach",
    "foreach_large_tensor",
    "peak_memory_foreach",
    "fused_matches_forloop",
    "fused_error_on_params_on_meta",
    "fused_large_tensor",
    "fused_does_not_step_if_foundinf",
    "cpu_load_state_dict",
    "param_groups_weight_decay",
    "param_groups_lr",
    "step_is_noop_when_params_have_no_grad",
    "step_is_noop_for_zero_grads",
    "optimizer_can_be_printed",
    "state_dict_deterministic",
    "can_load_older_state_dict",
    "can_load_from_to_named_state_dict",
    "save_load_equality_with_weights_only",
    "load_nontensor_step",
    "state_dict_with_cuda_params",
    "state_dict_pre_hook",
    "state_dict_post_hook",
    "state_dict_pre_post_hook",
    "load_state_dict_pre_hook_and_prepend",
    "load_state_dict_post_hook",
    "load_state_dict_pre_post_hook",
    "step_post_hook",
    "step_pre_hook",
    "step_all_hooks",
    "deepcopy_copies_all_public_attrs",
    "second_order_optims_return_consistent_types",
    "fused_cpu_matches_cuda",
    "defaults_changed_to_foreach",
    "non_empty_state",
]
STATES = {"passes", "deviates", "not applicable"}
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|(.*)\|$", re.MULTILINE)


def rows(section):
    """(case, state, test, remark) of the table under a heading that starts with these words."""
    text = (ROOT / "docs/optimizer-contract.md").read_text()
    body = re.split(r"^## ", text, flags=re.MULTILINE)
    (part,) = (one for one in body if one.startswith(section))
    return [tuple(cell.strip() for cell in row) for row in ROW.findall(part) if row[1].strip() != "here"]


def names_of_tests(pattern):
    """Names of the tests in the files of this folder, and which of them need a GPU."""
    found = {}
    for path in sorted((ROOT / "tests/optimizer").glob(pattern)):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = any("mark.gpu" in ast.unparse(one) for one in node.decorator_list)
    return found


OURS = rows("The cases of PyTorch")
BEYOND = rows("Beyond")


def test_every_case_of_torch_has_its_row():
    assert sorted(case for case, *_ in OURS if case != "TestDifferentiableOptimizer") == sorted(TORCH_CASES)


def test_no_case_that_this_torch_mentions_is_missing():
    """torch's own OptimizerInfo entries name the cases that they skip or loosen."""
    spec = importlib.util.find_spec("torch.testing._internal.common_optimizers")
    mentioned = set(re.findall(r'"test_(\w+)"', pathlib.Path(spec.origin).read_text()))
    assert len(mentioned) > 15
    # CompiledOptimizerTests.test_correctness: here test_compiled_train_step.
    assert mentioned - {"correctness"} <= set(TORCH_CASES)


def test_every_test_has_its_row():
    named = {test for _, _, test, _ in OURS + BEYOND}
    files = ("test_torch_contract.py", "test_torch_contract_beyond.py", "test_torch_contract_programs.py")
    there = set().union(*map(names_of_tests, files))
    assert sorted(there - named) == []


def test_every_row_names_a_test_and_explains_what_differs():
    there = names_of_tests("test_*.py")
    for case, state, test, remark in OURS + BEYOND:
        assert state in STATES, case
        assert (test == "–") == (state == "not applicable"), case
        assert state == "passes" or remark, f"{case}: {state} without a reason"
        if test != "–":
            assert test in there, f"{case}: no {test}"
            assert there[test] == remark.startswith("GPU"), f"{case}: the row and the marker differ on needing a GPU"
        if case in TORCH_CASES and state == "passes" and test not in ("test_step_hook", "test_fused_matches_forloop"):
            assert test == f"test_{case}", case
