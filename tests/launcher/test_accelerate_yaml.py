"""The YAML of accelerate config: the guide's is read and written; each key acts, is told of, or is an error."""

import pytest

from megalith.common.errors import ConfigError
from megalith.config.flags.flags import CommandLine
from megalith.launcher.accelerate_config import AccelerateConfig
from megalith.launcher.accelerate_yaml import resolve, to_yaml
from tests.launcher.files import GUIDE


@pytest.fixture
def read(tmp_path):
    """Reads a text as a file, with flags over it."""

    def read(text, **flags):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return resolve(file, CommandLine(values=flags))

    return read


def test_the_guides_file_comes_back_byte_for_byte(read):
    config, lines = read(GUIDE)
    assert lines == [] and to_yaml(config) == GUIDE
    assert config.environment() == {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_MEGATRON_LM": "true",
        "MEGATRON_LM_TP_DEGREE": "2",
        "MEGATRON_LM_PP_DEGREE": "2",
        "MEGATRON_LM_NUM_MICRO_BATCHES": "2",
        "MEGATRON_LM_GRADIENT_CLIPPING": "1.0",
        "MEGATRON_LM_SEQUENCE_PARALLELISM": "true",
        "MEGATRON_LM_USE_DISTRIBUTED_OPTIMIZER": "true",
        "MEGATRON_LM_RECOMPUTE_ACTIVATIONS": "true",
    }


def test_flags_override_the_file(read):
    config, _ = read(GUIDE, mixed_precision="fp16", megatron_lm_pp_degree="1", num_processes="2")
    assert (config.mixed_precision, config.megatron_lm_pp_degree, config.processes) == ("fp16", 1, 2)
    assert config.megatron_lm_tp_degree == 2


def test_without_a_file():
    assert resolve(None, CommandLine()) == (AccelerateConfig(), ["--num-processes is not given: 1 starts"])


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_other_types_run_too(read, kind):
    """The file that today's accelerate config writes for them."""
    text = (
        f"compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: {kind}\ndowncast_bf16: 'no'\n"
        "enable_cpu_affinity: false\ngpu_ids: all\nmachine_rank: 0\nmain_training_function: main\n"
        "mixed_precision: no\nnum_machines: 1\nnum_processes: 1\nrdzv_backend: static\nsame_network: true\n"
        "tpu_env: []\ntpu_use_cluster: false\ntpu_use_sudo: false\nuse_cpu: true\nmpirun_config: {}\n"
        "dynamo_config:\n  backend: INDUCTOR\n  dynamo_mode: default\n"
    )
    config, lines = read(text)
    assert lines == [] and config.distributed_type == kind and config.dynamo_backend == "INDUCTOR"
    assert config.environment()["ACCELERATE_MIXED_PRECISION"] == "no"


def test_json_is_read(read):
    assert read('{"distributed_type": "MULTI_CPU", "num_processes": 2}')[0].processes == 2


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("megatron_lm_config: {megatron_lm_recompute_activation: true}", "megatron_lm_recompute_activations", True),
        ("megatron_lm_config: {megatron_lm_context_parallel_size: 1}", "megatron_lm_context_parallel_size", 1),
        ("megatron_lm_config: {megatron_lm_attention_backend: flash}", "megatron_lm_attention_backend", "flash"),
        ("fp16: true", "mixed_precision", "fp16"),
        ("dynamo_backend: 'NO'", "dynamo_backend", "NO"),
    ],
)
def test_old_and_new_keys(read, line, field, value):
    assert getattr(read(f"distributed_type: MEGATRON_LM\nnum_processes: 1\n{line}\n")[0], field) == value


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("tpu_name: mine", "tpu_name has no effect here: it is for TPUs"),
        ("downcast_bf16: true", "downcast_bf16 has no effect here: it is for TPUs"),
        ("main_training_function: train", "the script is run from its first line"),
        ("same_network: false", "machines meet at main_process_ip"),
        ("ipex_config: {ipex: true}", "ipex_config has no effect"),
        ("rdzv_backend: etcd", "rdzv_backend etcd has no effect with one machine"),
    ],
)
def test_what_has_no_effect_is_told(read, line, why):
    _, (told,) = read(f"distributed_type: MULTI_GPU\nnum_processes: 2\n{line}\n")
    assert why in told


def test_one_process_that_is_several_is_told(read):
    assert "distributed_type NO is not one process here" in read("distributed_type: NO\nnum_processes: 2\n")[1][0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_procesess: 4", "config.yaml: there is no key num_procesess here. Write num_processes."),
        ("qqqq: 4", "Remove it, or correct it; the keys are those of Accelerate 0.14 to 1.15."),
        ("megatron_lm_tp_degree: 2", "no key megatron_lm_tp_degree here. Indent it below megatron_lm_config."),
        ("megatron_lm_config: {tp_degree: 2}", "no key tp_degree here. Write megatron_lm_tp_degree."),
        ("megatron_lm_config: {megatron_lm_tp_degre: 2}", "Write megatron_lm_tp_degree."),
        ("megatron_lm_config: 2", "megatron_lm_config must map names to values; found 2"),
        ("megatron_lm_config: {megatron_lm_tp_degree: x}", "megatron_lm_config.megatron_lm_tp_degree must be a whole"),
        (
            "megatron_lm_config: {megatron_lm_recompute_activation: true, megatron_lm_recompute_activations: false}",
            "megatron_lm_recompute_activations must not be given beside",
        ),
        ("deepspeed_config: {zero_stage: 2}", "must be empty, because only DEEPSPEED reads it"),
        ("fsdp_config: {fsdp_version: 2}", "megatron_lm_use_custom_fsdp: true shards parameters too"),
        ("parallelism_config: {parallelism_config_tp_size: 2}", "megatron_lm_config has megatron_lm_tp_degree"),
        ("mpirun_config: {mpirun_hostfile: h}", "give this command on each machine with its --machine_rank"),
        ("fp8_config: {backend: TE}", "Leave it out and write mixed_precision: bf16"),
        ("num_machines: 2", "--main-process-ip must be the address"),
        ("num_processes: 4\nnum_processes: 8", "num_processes is given twice"),
        ("mixed_precision:bf16", "not valid YAML"),
    ],
)
def test_errors(read, line, message):
    with pytest.raises(ConfigError) as error:
        read(f"distributed_type: MEGATRON_LM\n{line}\n")
    assert message in str(error.value) and "problems" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map names to values"),
        ("- 1", "must map names to values"),
        ("num_processes: 2", "distributed_type must be given; found nothing"),
    ],
)
def test_files_that_are_no_configuration(read, text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_all_problems_are_found_at_once(read):
    with pytest.raises(ConfigError) as error:
        read("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nnum_procs: 2\n", mixed_precision="fp64")
    text = str(error.value)
    assert text.startswith("3 problems") and "FSDP" in text and "num_procs" in text and "--mixed-precision" in text


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"--config-file must name a readable YAML file \(No such file"):
        resolve(tmp_path / "gone.yaml", CommandLine())
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="readable"):
        resolve(tmp_path / "latin", CommandLine())
