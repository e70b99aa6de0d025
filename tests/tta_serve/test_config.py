from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tta_serve import config
from tta_serve.config import AuthSettings, Config, load, read_tokens
from tta_serve.errors import ConfigError

DIGITS = "source: {builtin: digits}"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """`write(text)`: the path of a file that holds it."""

    def make(text: str) -> Path:
        path = tmp_path / "server.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def one(write: Callable[[str], Path]) -> Callable[[str], Any]:
    """`one("device: cpu")`: the settings of the only model of a file, with these words in it."""
    return lambda words: load(write(f"models: [{{name: m, {words}}}]")).models[0]


@pytest.fixture
def problems(write: Callable[[str], Path]) -> Callable[[str], list[str]]:
    """`problems(text)`: what is said of a file that holds it, without the file's path; each begins `LINE: `."""

    def make(text: str) -> list[str]:
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load(path)
        lines = str(caught.value).splitlines()
        assert all(line.startswith(f"{path}:") for line in lines)
        return [line.removeprefix(f"{path}:") for line in lines]

    return make


def test_a_short_file_has_good_defaults(write: Callable[[str], Path]) -> None:
    settings = load(write("models:\n  - name: digits\n    source: {builtin: digits}\n"))
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8000)
    assert settings.limits.body_bytes == 32 * 2**20
    assert settings.limits.image_pixels == 25_000_000
    (model,) = settings.models
    assert model.adapter.eata is not None
    assert model.adaptation.mode == "async"
    assert (model.replicas, model.device, model.threads) == (1, "auto", "auto")
    assert model.streams.model_dump() == {"max": 10_000, "resident": 1024, "new_per_minute": 600}
    assert settings.auth.tenants == {}
    assert settings.store.model_dump() == {"path": "tta-state", "sync_interval_s": 1.0}
    assert settings.store.folder == Path("tta-state")


def test_a_long_file_is_read_in_full(write: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("prior.npz", "weights.pt"):
        (tmp_path / name).touch()
    text = f"""
http: {{host: 0.0.0.0, port: 9000}}
limits: {{body_bytes: 1MB, image_pixels: 25e6, images_per_request: 8}}
auth: {{infer_token_env: A, admin_token_env: B, tenants: {{acme: C, b.c_d-1: D}}}}
models:
  - name: a.b_c-1
    source: torchvision/resnet18
    weights: {tmp_path}/weights.pt
    input: {{size: [224, 200], resize: 256, mean: [0.5, 0.4, 0.3], std: [0.2, 0.2, 0.1]}}
    labels: [cat, dog]
    prior: {tmp_path}/prior.npz
    device: cuda:1
    threads: 3
    adapter: {{eata: {{entropy_margin: 0.5, redundancy_margin: auto, anchor: l2, optimizer: sgd}}}}
    adaptation: {{mode: sync, budget: 1, step_rows: 4, step_wait_s: 2, queue_rows: 10}}
    batching: {{rows_max: 8, queue_rows: 16}}
    streams: {{max: 5, resident: 1, new_per_minute: 1e3}}
"""
    settings = load(write(text))
    assert settings.http.port == 9000
    assert settings.limits.model_dump() == {
        "body_bytes": 10**6,
        "image_pixels": 25 * 10**6,
        "images_per_request": 8,
        "request_pixels": 10**8,
    }
    (model,) = settings.models
    assert model.source.torchvision == "resnet18"
    assert model.input is not None
    assert (model.input.size, model.input.resize, model.input.std) == ((224, 200), 256, (0.2, 0.2, 0.1))
    assert model.labels == ("cat", "dog")
    assert model.prior == tmp_path / "prior.npz"
    assert model.adapter.eata is not None
    assert (model.adapter.eata.entropy_margin, model.adapter.eata.redundancy_margin) == (0.5, "auto")
    assert model.adaptation.model_dump() == {
        "mode": "sync",
        "budget": 1.0,
        "step_rows": 4,
        "step_wait_s": 2.0,
        "queue_rows": 10,
        "gate": True,
        "probe": None,
        "forgetting_max": 0.02,
    }
    assert (model.threads, model.batching.rows_max) == (3, 8)
    assert model.streams.model_dump() == {"max": 5, "resident": 1, "new_per_minute": 1000}
    assert settings.auth.tenants == {"acme": "C", "b.c_d-1": "D"}


@pytest.mark.parametrize(
    ("written", "kind", "name"),
    [
        ("torchvision/resnet18", "torchvision", "resnet18"),
        ("{torchvision: resnet18}", "torchvision", "resnet18"),
        ("{builtin: digits}", "builtin", "digits"),
        ("builtin/noop", "builtin", "noop"),
        ("{python: my_pkg.models:build}", "python", "my_pkg.models:build"),
        ("python/my_pkg:Factory.build", "python", "my_pkg:Factory.build"),
        ("{builtin: digits, python: null}", "builtin", "digits"),
    ],
)
def test_every_notation_of_a_source(one: Callable[[str], Any], written: str, kind: str, name: str) -> None:
    source = one(f"source: {written}, input: {{size: [8, 8]}}").source
    expected: dict[str, str | None] = {"builtin": None, "torchvision": None, "python": None, kind: name}
    assert source.model_dump() == expected


@pytest.mark.parametrize(
    ("written", "eata", "source"),
    [
        ("eata", True, False),
        ("{eata: {}}", True, False),
        ("{eata: }", True, False),
        ("source", False, True),
        ("{source: true}", False, True),
    ],
)
def test_every_notation_of_an_adapter(one: Callable[[str], Any], written: str, eata: bool, source: bool) -> None:
    adapter = one(f"{DIGITS}, adapter: {written}").adapter
    assert (adapter.eata is not None, adapter.source is not None) == (eata, source)


@pytest.mark.parametrize(
    ("written", "pixels"), [("25e6", 25_000_000), ("25_000", 25_000), ("1e+3", 1000), ("7.0", 7), ("'12'", 12)]
)
def test_notations_of_a_count(write: Callable[[str], Path], written: str, pixels: int) -> None:
    assert load(write(f"limits: {{image_pixels: {written}}}\nmodels: [{{name: m, {DIGITS}}}]")).limits == (
        config.LimitSettings(image_pixels=pixels)
    )


@pytest.mark.parametrize(
    ("written", "amount"), [("32MiB", 32 * 2**20), ("1kB", 1000), ("4096", 4096), ("1.5 KiB", 1536)]
)
def test_notations_of_bytes(write: Callable[[str], Path], written: str, amount: int) -> None:
    assert (
        load(write(f"limits: {{body_bytes: {written}}}\nmodels: [{{name: m, {DIGITS}}}]")).limits.body_bytes == amount
    )


def test_anchors_and_merge_keys_work(write: Callable[[str], Path]) -> None:
    text = f"models:\n- &a {{name: a, {DIGITS}, device: cpu}}\n- {{<<: *a, name: b}}\n"
    assert [(m.name, m.device) for m in load(write(text)).models] == [("a", "cpu"), ("b", "cpu")]


def test_every_problem_is_reported_at_once_each_with_its_line(problems: Callable[[str], list[str]]) -> None:
    text = """\
http: {port: 70000}
colour: red
models:
  - name: a
    source: {builtin: digits}
    adaptation:
      budget: 0.01
      stepp_rows: 3
  - name: "b c"
    source: torchvision/resnet18
"""
    lines = sorted(problems(text), key=lambda line: int(line.partition(":")[0]))
    assert lines == [
        "1: http.port: Input should be less than or equal to 65535, not 70000",
        "2: colour: there is no such key",
        "7: models.0.adaptation.budget: Input should be greater than or equal to 0.05, not 0.01",
        "8: models.0.adaptation.stepp_rows: there is no such key",
        "9: models.1.name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$', not 'b c'",
    ]


def test_a_missing_key_is_reported_where_it_belongs(problems: Callable[[str], list[str]]) -> None:
    assert problems("models:\n- name: a\n  source: builtin/digits\n- name: b\n") == [
        "4: models.1.source: Field required"
    ]


def test_a_key_given_twice_is_refused(problems: Callable[[str], list[str]]) -> None:
    assert problems("http: {port: 1}\nmodels: []\nhttp: {port: 2}\n") == ["1: the key 'http' is given twice"]
    assert problems(f"models:\n- name: a\n  {DIGITS}\n  device: cpu\n  device: cpu\n") == [
        "4: the key 'device' is given twice"
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "[1, 2]\n", "models\n", "3\n"])
def test_a_file_that_is_no_mapping(problems: Callable[[str], list[str]], text: str) -> None:
    assert problems(text) == ["1: the file must be a mapping with the key `models`"]


def test_a_mistake_of_yaml_has_its_line(problems: Callable[[str], list[str]]) -> None:
    assert problems("http:\n  port: 1\nmodels: a: b\n") == ["3: mapping values are not allowed here"]
    assert problems("http: {port: 1\nmodels: []\n")[0].startswith("2: ")
    assert problems("a: !!python/object/apply:os.getcwd []\n")[0].startswith("1: could not determine a constructor")


@pytest.mark.parametrize("text", ["http: {port: 2020-13-45}", "http: {port: 0b_}", "[" * 1000])
def test_what_yaml_itself_cannot_read(write: Callable[[str], Path], text: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_control_character(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="special characters are not allowed"):
        load(write("a: \x00"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("models: [é]".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read: .*can't decode"):
        load(tmp_path / "latin.yaml")


def test_a_store_is_a_folder_that_need_not_be_there(write: Callable[[str], Path], tmp_path: Path) -> None:
    settings = load(write(f"store: {{path: {tmp_path}/state}}\nmodels: [{{name: m, {DIGITS}}}]"))
    assert settings.store.folder == tmp_path / "state"
    assert not settings.store.folder.exists()


def test_replicas_share_the_store(one: Callable[[str], Any]) -> None:
    assert one(f"{DIGITS}, replicas: 3").replicas_max == 3
    scaled = one(f"{DIGITS}, autoscaling: {{min_replicas: 2, max_replicas: 5}}")
    assert (scaled.replicas_max, scaled.autoscaling.min_replicas) == (5, 2)
    assert one(f"{SCENES}, replicas: 2, adapter: {{modtr: {{learns: stream}}}}").replicas_max == 2


@pytest.mark.parametrize(
    ("written", "eata"),
    [
        ("kv_bottleneck", False),
        ("{kv_bottleneck: }", False),
        ("{kv_bottleneck: {}}", False),
        ("{eata: {}, kv_bottleneck: {}}", True),
    ],
)
def test_every_notation_of_kv_bottleneck(one: Callable[[str], Any], written: str, eata: bool) -> None:
    adapter = one(f"{DIGITS}, adapter: {written}").adapter
    assert (adapter.eata is not None) == eata
    assert adapter.kv_bottleneck.model_dump() == {
        "head": "counts",
        "answers": "combined",
        "codebooks": 256,
        "branches": (16, 4, 4),
        "classes_max": 100,
        "labels_per_class": 4096,
        "labels_max": 100_000,
    }


def test_kv_bottleneck_in_full(one: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "images.npz").touch()
    model = one(
        f"source: torchvision/resnet18, weights: DEFAULT, prior: {tmp_path}/images.npz, adapter: {{kv_bottleneck: "
        "{head: ridge, answers: head, codebooks: 8, branches: [4, 2], classes_max: 3, labels_per_class: 5}}, "
        "feedback: {remember_images: 0}"
    )
    assert model.adapter.kv_bottleneck.model_dump() == {
        "head": "ridge",
        "answers": "head",
        "codebooks": 8,
        "branches": (4, 2),
        "classes_max": 3,
        "labels_per_class": 5,
        "labels_max": 100_000,
    }
    assert model.feedback.remember_images == 0


def test_keys_are_made_from_images_and_no_weights(problems: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "prior.safetensors").touch()
    (problem,) = problems(
        f"models: [{{name: m, source: torchvision/resnet18, adapter: kv_bottleneck, "
        f"prior: {tmp_path}/prior.safetensors}}]"
    )
    assert "kv_bottleneck needs `prior`: an .npz with `images`" in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "models: give at least one model"),
        (f"store: {{url: x}}\nmodels: [{{name: a, {DIGITS}}}]", "store.url: there is no such key"),
        ("http: {}", "models: Field required"),
        ("models: 3", "models: Input should be a valid tuple, not 3"),
        ("models: [3]", "models.0: Input should be a valid dictionary or instance of ModelSettings, not 3"),
        (f"models: [{{name: a, {DIGITS}}}, {{name: a, {DIGITS}}}]", "two models are named a"),
        (f"1: 2\nmodels: [{{name: a, {DIGITS}}}]", "1: Keys should be strings, not 1"),
    ],
)
def test_problems_of_the_whole_file(problems: Callable[[str], list[str]], text: str, said: str) -> None:
    assert problems(text) == [f"1: {said}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("source: resnet18", "source: 'resnet18' is not a source; write torchvision/NAME, {builtin: NAME}"),
        ("source: {}", "source: give exactly one of builtin, torchvision, python"),
        ("source: {builtin: }", "source: give exactly one of builtin, torchvision, python"),
        (
            "source: {builtin: digits, torchvision: resnet18}",
            "source: give exactly one of builtin, torchvision, python",
        ),
        ("source: huggingface/vit", "source.huggingface: there is no such key"),
        (
            "source: {builtin: letters}",
            "source.builtin: Input should be 'digits', 'digit-scenes', 'efficientnet-lite0' or 'noop', not 'letters'",
        ),
        ("source: {python: my_pkg}", "source.python: String should match pattern"),
        ("source: {python: 'my_pkg:f()'}", "source.python: String should match pattern"),
        ("source: torchvision/ResNet", "source.torchvision: String should match pattern"),
        (
            f"{DIGITS}, adapter: {{}}",
            "adapter: give eata: {…} and/or kv_bottleneck: {…}, or modtr: {…} and/or alignment: {…}, or source: true",
        ),
        (
            f"{DIGITS}, adapter: {{eata: {{}}, source: true}}",
            "adapter: give eata: {…} and/or kv_bottleneck: {…}, or modtr: {…} and/or",
        ),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{}}, source: true}}", "adapter: give eata: {…} and/or kv_bottleneck"),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{}}, modtr: {{}}}}", "adapter: give eata: {…} and/or kv_bottleneck"),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{head: tree}}}}",
            "adapter.kv_bottleneck.head: Input should be 'counts'",
        ),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{answers: both}}}}", "adapter.kv_bottleneck.answers: Input should be "),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{codebooks: 0}}}}", "adapter.kv_bottleneck.codebooks: Input should be"),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{branches: [4, 1]}}}}",
            "adapter.kv_bottleneck.branches.1: Input should",
        ),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{branches: []}}}}",
            "adapter.kv_bottleneck: branches [] give 0 keys; there can be 2 to 32768",
        ),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{branches: [256, 129]}}}}",
            "adapter.kv_bottleneck: branches [256, 129] give 33024 keys; there can be 2 to 32768",
        ),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{classes_max: 0}}}}",
            "adapter.kv_bottleneck.classes_max: Input should",
        ),
        (
            f"{DIGITS}, adapter: {{kv_bottleneck: {{codebooks: 4096, branches: [16, 16, 2]}}}}",
            "adapter.kv_bottleneck: 4096 codebooks of 512 keys are 2097152 values for each class",
        ),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{labels_per_class: 0}}}}", "adapter.kv_bottleneck.labels_per_class: "),
        (f"{DIGITS}, adapter: {{kv_bottleneck: {{keys: 4}}}}", "adapter.kv_bottleneck.keys: there is no such key"),
        (
            "source: torchvision/resnet18, weights: DEFAULT, adapter: kv_bottleneck",
            "kv_bottleneck needs `prior`: an .npz with `images` like those that will come, without labels, uint8",
        ),
        (f"{DIGITS}, adapter: {{source: false}}", "adapter.source: Input should be True, not False"),
        (f"{DIGITS}, adapter: tent", "adapter: Input should be a valid dictionary"),
        (f"{DIGITS}, adapter: {{tent: {{}}}}", "adapter.tent: there is no such key"),
        (f"{DIGITS}, replicas: 2, adaptation: {{mode: sync}}", "adaptation.mode: sync is one replica's protocol"),
        (f"{DIGITS}, replicas: 2, autoscaling: {{max_replicas: 3}}", "give either replicas or autoscaling"),
        (f"{DIGITS}, autoscaling: {{min_replicas: 4, max_replicas: 3}}", "autoscaling: min_replicas 4 is above max"),
        (f"{DIGITS}, replicas: 0", "replicas: Input should be greater than or equal to 1, not 0"),
        (f"{DIGITS}, weights: COCO", "a built-in model brings its own weights; remove `weights`"),
        ("source: {python: 'a:b'}", "a model from python needs `input: {size: [height, width]"),
        (
            "source: {python: 'a:b'}, input: {size: [8, 8]}, weights: BEST",
            "weights: 'BEST' is not a file (.safetensors",
        ),
        ("source: torchvision/resnet18, weights: none/w.pt", "weights: none/w.pt is not a file"),
        ("source: torchvision/resnet18, weights: none.safetensors", "weights: none.safetensors is not a file"),
        (f"{DIGITS}, prior: none.npz", "prior: none.npz is not a file"),
        (f"{DIGITS}, input: {{size: [8]}}", "input.size.1: Field required"),
        (f"{DIGITS}, input: {{size: [8, 0]}}", "input.size.1: Input should be greater than 0, not 0"),
        (f"{DIGITS}, input: {{size: [8, 8], std: [1, 0, 1]}}", "input: std must be above 0, not [1.0, 0.0, 1.0]"),
        (f"{DIGITS}, device: tpu", "device: String should match pattern '^(auto|cpu|cuda(:\\d+)?)$', not 'tpu'"),
        (f"{DIGITS}, runtime: onnx", "runtime: Input should be 'eager' or 'compile', not 'onnx'"),
        (f"{DIGITS}, threads: 0", "threads: Input should be greater than 0, not 0 (or auto)"),
        (
            f"{DIGITS}, threads: many",
            "threads: Input should be a valid integer, unable to parse string as an integer, ",
        ),
        (
            f"{DIGITS}, adapter: {{eata: {{entropy_margin: -1}}}}",
            "adapter.eata.entropy_margin: Input should be greater",
        ),
        (f"{DIGITS}, adapter: {{eata: {{momentum: 1}}}}", "adapter.eata.momentum: Input should be less than 1, not 1"),
        (f"{DIGITS}, adaptation: {{mode: later}}", "adaptation.mode: Input should be 'async' or 'sync', not 'later'"),
        (
            f"{DIGITS}, adaptation: {{budget: 1.1}}",
            "adaptation.budget: Input should be less than or equal to 1, not 1.1",
        ),
        (f"{DIGITS}, adaptation: {{step_wait_s: 0}}", "adaptation.step_wait_s: Input should be greater than 0, not 0"),
        (f"{DIGITS}, adaptation: {{step_rows: 1.5}}", "adaptation.step_rows: Input should be a valid integer"),
        (f"{DIGITS}, batching: {{rows_max: .inf}}", "batching.rows_max: Input should be a finite number, not inf"),
        (f"{DIGITS}, batching: {{rows_max: .nan}}", "batching.rows_max: Input should be a finite number, not nan"),
        (f"{DIGITS}, streams: {{max: 0}}", "streams.max: Input should be greater than 0, not 0"),
        (f"{DIGITS}, streams: ", "streams: Input should be a valid dictionary or instance of StreamSettings, not None"),
        (f"{DIGITS}, labels: [0, 1]", "labels.0: Input should be a valid string, not 0"),
    ],
)
def test_problems_of_a_model(problems: Callable[[str], list[str]], words: str, said: str) -> None:
    first = problems(f"http: {{}}\nmodels:\n- {{name: m, {words}}}\n")[0]
    assert first.startswith((f"3: models.0.{said}", f"3: models.0: {said}"))


def test_a_setting_that_may_be_auto_is_one_problem(problems: Callable[[str], list[str]]) -> None:
    text = f"models: [{{name: m, {DIGITS}, threads: 0, adapter: {{eata: {{redundancy_margin: x}}}}}}]"
    assert problems(text) == [
        "1: models.0.threads: Input should be greater than 0, not 0 (or auto)",
        "1: models.0.adapter.eata.redundancy_margin: "
        "Input should be a valid number, unable to parse string as a number, not 'x' (or auto)",
    ]


@pytest.mark.parametrize("limits", ["body_bytes: 0", "body_bytes: -5", "body_bytes: 3 apples", "image_pixels: 0"])
def test_bad_limits(problems: Callable[[str], list[str]], limits: str) -> None:
    (line,) = problems(f"limits: {{{limits}}}\nmodels: [{{name: m, {DIGITS}}}]")
    assert line.startswith(f"1: limits.{limits.partition(':')[0]}: ")


def test_torchvision_weights_from_a_file_need_an_input(problems: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    (line,) = problems(f"models: [{{name: m, source: torchvision/resnet18, weights: {tmp_path}/w.pt}}]")
    assert "torchvision weights from a file need `input: {size: [height, width]" in line


def test_settings_never_change(write: Callable[[str], Path]) -> None:
    settings = load(write(f"models: [{{name: m, {DIGITS}}}]"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.http.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.models[0].adaptation.budget = 1.0  # type: ignore[misc]
    assert isinstance(settings.models, tuple)


def test_settings_survive_a_round_trip(write: Callable[[str], Path]) -> None:
    settings = load(write(f"models: [{{name: m, {DIGITS}}}]"))
    assert Config.model_validate(settings.model_dump(exclude_unset=True)) == settings


def test_tokens_come_from_the_variables_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_INFER", "one")
    monkeypatch.setenv("MY_ADMIN", "two")
    tokens = read_tokens(AuthSettings(infer_token_env="MY_INFER", admin_token_env="MY_ADMIN"))
    assert (tokens.infer, tokens.admin) == ("one", "two")


def test_without_a_name_predictions_are_open_and_without_a_token_admin_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TTA_ADMIN_TOKEN", raising=False)
    assert read_tokens(AuthSettings()).model_dump() == {"infer": None, "admin": None, "tenants": {}}
    monkeypatch.setenv("TTA_ADMIN_TOKEN", "")
    assert read_tokens(AuthSettings()).admin is None
    monkeypatch.setenv("TTA_ADMIN_TOKEN", "two")
    assert read_tokens(AuthSettings()).admin == "two"


@pytest.mark.parametrize("value", [None, ""])
def test_a_token_that_is_named_must_be_set(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("MY_INFER", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_INFER", value)
    with pytest.raises(ConfigError, match=r"infer_token_env names MY_INFER, which is not set; set it or remove"):
        read_tokens(AuthSettings(infer_token_env="MY_INFER"))


def test_tokens_of_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME", "one")
    monkeypatch.setenv("GLOBEX", "two")
    monkeypatch.delenv("TTA_ADMIN_TOKEN", raising=False)
    tokens = read_tokens(AuthSettings(tenants={"acme": "ACME", "globex": "GLOBEX"}))
    assert tokens.tenants == {"acme": "one", "globex": "two"}
    assert (tokens.infer, tokens.admin) == (None, None)


@pytest.mark.parametrize("value", [None, ""])
def test_the_token_of_a_tenant_must_be_set(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("ACME", raising=False)
    if value is not None:
        monkeypatch.setenv("ACME", value)
    with pytest.raises(ConfigError) as caught:
        read_tokens(AuthSettings(tenants={"acme": "ACME"}))
    assert str(caught.value) == "auth.tenants.acme names ACME, which is not set; set it or remove the tenant"


@pytest.mark.parametrize(
    ("variables", "owner"),
    [
        ({"acme": "A", "globex": "A"}, "tenants.acme"),
        ({"acme": "A", "globex": "B"}, "tenants.acme"),
        ({"globex": "INFER"}, "infer_token_env"),
        ({"globex": "ADMIN"}, "admin_token_env"),
    ],
)
def test_no_two_may_have_the_same_token(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], owner: str) -> None:
    for variable, token in {"A": "secret", "B": "secret", "INFER": "reader", "ADMIN": "boss"}.items():
        monkeypatch.setenv(variable, token)
    auth = AuthSettings(infer_token_env="INFER", admin_token_env="ADMIN", tenants=variables)
    with pytest.raises(ConfigError) as caught:
        read_tokens(auth)
    assert str(caught.value) == f"auth.tenants.globex and auth.{owner} give the same token; each needs its own"


@pytest.mark.parametrize("name", ["a:b", "-a", "", "a b", "é", "a" * 33])
def test_bad_names_of_tenants(problems: Callable[[str], list[str]], name: str) -> None:
    (problem,) = problems(f"auth:\n  tenants:\n    ok: A\n    {name!r}: B\nmodels: [{{name: m, {DIGITS}}}]")
    assert problem == (
        f"4: auth.tenants.{name}: {name!r} cannot name a tenant: 1 to 32 letters, digits, '.', '_' or '-', "
        "beginning with a letter or digit"
    )


@pytest.mark.parametrize("key", ["max", "resident", "new_per_minute"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "null"])
def test_a_number_of_streams_is_at_least_one(problems: Callable[[str], list[str]], key: str, value: str) -> None:
    (problem,) = problems(f"models: [{{name: m, {DIGITS}, streams: {{{key}: {value}}}}}]")
    assert problem.startswith(f"1: models.0.streams.{key}: Input should be ")


# -- detectors --------------------------------------------------------------------------------------------------------

SCENES = "source: builtin/digit-scenes"


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("builtin/digit-scenes", "detection"),
        ("builtin/digits", "classification"),
        ("torchvision/fasterrcnn_resnet50_fpn, weights: COCO_V1", "detection"),
        ("torchvision/fcos_resnet50_fpn, weights: COCO_V1", "detection"),
        ("torchvision/retinanet_resnet50_fpn, weights: COCO_V1", "detection"),
        ("torchvision/ssd300_vgg16, weights: COCO_V1", "detection"),
        ("torchvision/ssdlite320_mobilenet_v3_large, weights: COCO_V1", "detection"),
        ("torchvision/resnet18", "classification"),
        ("{python: 'a:b'}, input: {size: [8, 8]}", "classification"),
        ("{python: 'a:b'}, task: detection, labels: [cat]", "detection"),
    ],
)
def test_what_a_source_is_for(one: Callable[[str], Any], source: str, task: str) -> None:
    model = one(f"source: {source}")
    assert model.task == task
    assert (model.adapter.modtr is not None, model.adapter.eata is not None) == (
        task == "detection",
        task != "detection",
    )


@pytest.mark.parametrize("written", ["modtr", "{modtr: {}}", "{modtr: }"])
def test_every_notation_of_modtr(one: Callable[[str], Any], written: str) -> None:
    modtr = one(f"{SCENES}, adapter: {written}").adapter.modtr
    assert (modtr.learns, modtr.router_confidence, modtr.ap50_drop_max) == ("both", 0.9, 0.05)
    assert (modtr.stream_learning_rate, modtr.modality_learning_rate) == (1e-3, 1e-4)


def test_a_detector_in_full(one: Callable[[str], Any], tmp_path: Path) -> None:
    for name in ("ir", "uv"):
        (tmp_path / name).touch()
    (tmp_path / "probe").mkdir()
    model = one(
        f"{SCENES}, adapter: {{modtr: {{learns: stream, router_confidence: 0.99, ap50_drop_max: 0.1}}}}, "
        f"translators: {{ir: {tmp_path}/ir, uv_2-x: {{file: {tmp_path}/uv, probe: {tmp_path}/probe}}}}, "
        "feedback: {remember_images: 7, remember_bytes: 1MB, remember_s: 60}"
    )
    assert model.adapter.modtr.learns == "stream"
    assert {name: (each.file.name, each.probe) for name, each in model.translators.items()} == {
        "ir": ("ir", None),
        "uv_2-x": ("uv", tmp_path / "probe"),
    }
    assert model.feedback.model_dump() == {"remember_images": 7, "remember_bytes": 10**6, "remember_s": 60}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            f"{SCENES}, adapter: eata",
            "adapter: eata and kv_bottleneck are for classifiers; a detector takes modtr, alignment, both or source",
        ),
        (
            f"{SCENES}, adapter: kv_bottleneck",
            "adapter: eata and kv_bottleneck are for classifiers; a detector takes modtr, alignment, both or source",
        ),
        (f"{SCENES}, input: {{size: [8, 8]}}", "input: a detector resizes and normalises by itself; remove it"),
        (f"{SCENES}, runtime: compile", "runtime: a detector runs in eager"),
        (f"{SCENES}, adaptation: {{mode: sync}}", "adaptation: a detector has no mode sync"),
        (f"{SCENES}, task: classification", "task: this source is a detector"),
        (f"{SCENES}, weights: COCO_V1", "a built-in model brings its own weights"),
        (f"{SCENES}, replicas: 2", "replicas: what feedback teaches the weights that a modality's streams share stays"),
        (f"{SCENES}, adapter: source, translators: {{ir: FILE}}", "translators: only the adapter modtr uses them"),
        (f"{DIGITS}, task: detection", "task: builtin/digits is no detector"),
        (
            f"{DIGITS}, adapter: modtr",
            "translators and the adapters modtr and alignment are for detectors (task: detection)",
        ),
        (f"{DIGITS}, translators: {{ir: FILE}}", "translators and the adapters modtr and alignment are for detectors"),
        (f"{DIGITS}, task: segmentation", "task: Input should be 'classification' or 'detection', not 'segmentation'"),
        (f"{SCENES}, adapter: {{modtr: {{learns: all}}}}", "adapter.modtr.learns: Input should be 'both', 'stream', "),
        (
            f"{SCENES}, adapter: {{modtr: {{router_confidence: 0.5}}}}",
            "adapter.modtr.router_confidence: Input should be",
        ),
        (f"{SCENES}, adapter: {{modtr: {{modality_learning_rate: 0}}}}", "adapter.modtr.modality_learning_rate: Input"),
        (f"{SCENES}, adapter: {{modtr: {{}}, source: true}}", "adapter: give eata: {…} and/or kv_bottleneck"),
        (f"{SCENES}, translators: {{ir: none.safetensors}}", "translators.ir.file: none.safetensors is not a file"),
        (f"{SCENES}, translators: {{ir: {{file: FILE, probe: none}}}}", "translators.ir.probe: none is not a folder"),
        (f"{SCENES}, translators: {{ir: {{}}}}", "translators.ir.file: Field required"),
        (f"{SCENES}, feedback: {{remember_s: 0}}", "feedback.remember_s: Input should be greater than 0, not 0"),
        (f"{SCENES}, feedback: {{remember_images: -1}}", "feedback.remember_images: Input should be greater than or"),
        (f"{SCENES}, feedback: {{remember_bytes: -1}}", "feedback.remember_bytes: "),
    ],
)
def test_problems_of_a_detector(problems: Callable[[str], list[str]], tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "file").touch()
    first = problems(f"http: {{}}\nmodels:\n- {{name: m, {words.replace('FILE', f'{tmp_path}/file')}}}\n")[0]
    assert first.startswith((f"3: models.0.{said}", f"3: models.0: {said}"))


@pytest.mark.parametrize("name", ["rgb", "IR", "i r", "", "-ir", "_ir", "i" * 33, "ir/..", "é"])
def test_names_that_no_modality_can_have(problems: Callable[[str], list[str]], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (problem,) = problems(f"models: [{{name: m, {SCENES}, translators: {{{name!r}: {tmp_path}/file}}}}]")
    assert problem == (
        f"1: models.0.translators.{name}: {name!r} cannot name a translator's modality: 1 to 32 small letters, digits, "
        "'_' or '-', beginning with a letter or digit, and not 'rgb', which needs none"
    )


@pytest.mark.parametrize(
    ("learns", "shares"), [("both", True), ("modality", True), ("stream", False), ("nothing", False)]
)
def test_tenants_share_no_weights(write: Callable[[str], Path], learns: str, shares: bool) -> None:
    path = write(
        f"auth: {{tenants: {{acme: A}}}}\nmodels: [{{name: m, {SCENES}, adapter: {{modtr: {{learns: {learns}}}}}}}]\n"
    )
    if not shares:
        assert load(path).models[0].adapter.modtr.learns == learns
        return
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "the model m has weights that all streams of a modality share" in str(caught.value)
    assert "adapter: {modtr: {learns: stream}}" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("source: {python: 'a:b'}, task: detection", "a detector from python needs `labels`"),
        (f"{SCENES}, adaptation: {{probe: {__file__}}}", "adaptation.probe: of a classifier; a detector has"),
        (f"{SCENES}, adaptation: {{gate: false}}", "adaptation.gate: of a classifier; a detector has"),
        (f"{SCENES}, adapter: {{modtr: {{stream_learning_rate: 0.1}}}}", "adapter.modtr.stream_learning_rate: Input"),
    ],
)
def test_what_a_detector_has_no_use_for(problems: Callable[[str], list[str]], words: str, said: str) -> None:
    first = problems(f"http: {{}}\nmodels:\n- {{name: m, {words}}}\n")[0]
    assert first.startswith((f"3: models.0.{said}", f"3: models.0: {said}"))
