"""A graph for another runtime has the tokens that the model has."""

import onnx
import pytest
import torch
from lightvlm.inference.export import export_image_tokens
from lightvlm_cli.main import main
from tiny import GRIDS, NUM_PATCHES, make_image, make_model, make_processor

IMAGES = [make_image(0), make_image(1)]


def run_graph(path, pixels):
    """Return tokens and kept indices by the runtime of each format."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(pixels)
    if path.suffix == ".onnx":
        import onnxruntime

        found = onnxruntime.InferenceSession(path).run(
            ["image_tokens", "kept_indices"], {"pixel_values": pixels.numpy()}
        )
    else:
        import openvino

        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        output = compiled({"pixel_values": pixels.numpy()})
        found = [output["image_tokens"], output["kept_indices"]]
    return [torch.tensor(each) for each in found]


@pytest.mark.parametrize(
    "suffix", [".pt2", *(pytest.param(name, marks=pytest.mark.slow) for name in (".onnx", ".xml"))]
)
@pytest.mark.parametrize(("vision", "select"), [("clip", "diverse"), ("siglip", "topk")])
def test_a_graph_has_the_tokens_of_the_model(tmp_path, suffix, vision, select):
    model, path = make_model(vision, select=select), tmp_path / f"graph{suffix}"
    pixels = make_processor(vision).image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    torch.nn.init.normal_(model.model.pruner.row_embedding.weight)
    export_image_tokens(model, path, 9, batch_size=2)
    tokens, kept = run_graph(path, pixels)
    expected = model.model.get_image_features(pixels, num_image_tokens=9)
    assert kept.tolist() == [indices.tolist() for indices in expected.kept_indices]
    torch.testing.assert_close(tokens, torch.stack(expected.pooler_output), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_in_int8_a_graph_is_smaller_and_has_nearly_the_same_tokens(tmp_path, vision):
    model = make_model(vision, select="topk")
    pixels = make_processor(vision).image_processor(IMAGES[:1], return_tensors="pt")["pixel_values"]
    for name, int8 in (("whole", False), ("int8", True)):
        export_image_tokens(model, tmp_path / f"{name}.onnx", NUM_PATCHES, int8=int8)
    (whole, kept), (tokens, same) = (run_graph(tmp_path / f"{name}.onnx", pixels) for name in ("whole", "int8"))
    assert kept.tolist() == same.tolist()
    error = (tokens - whole).norm() / whole.norm()
    assert 1e-4 < error < 0.03
    names = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    read = len(model.model.vision_tower.encoder.layers) - 1  # the last layer is not
    assert names.count("MatMulInteger") >= 6 * read + 2  # the projector has two
    assert names.count("MatMul") >= 2 * read  # of queries and keys, and of their weights and values
    assert (tmp_path / "int8.onnx").stat().st_size < 0.7 * (tmp_path / "whole.onnx").stat().st_size


@pytest.mark.slow
def test_an_image_of_one_view_has_its_tokens_where_others_have_many(tmp_path):
    model, processor = make_model(image_grid_pinpoints=GRIDS), make_processor(pinpoints=GRIDS)
    inputs = processor(images=IMAGES[0], text="<image>", return_tensors="pt")
    export_image_tokens(model, tmp_path / "graph.pt2", 9)
    tokens, _ = run_graph(tmp_path / "graph.pt2", inputs["pixel_values"].flatten(0, -4))
    expected = model.model.get_image_features(inputs["pixel_values"], image_sizes=inputs.get("image_sizes"))
    torch.testing.assert_close(tokens[0], expected.pooler_output[0], atol=1e-5, rtol=1e-5)


def test_the_language_model_is_not_in_the_file(tmp_path):
    model = make_model(text_config=make_model().config.text_config.to_dict() | {"intermediate_size": 40_000})
    export_image_tokens(model, tmp_path / "graph.pt2", 9)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / "graph.pt2").stat().st_size < weights / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "graph.bin"], "end the name in .pt2, .onnx, .xml"),
        (["--output", "graph.pt2", "--int8"], "int8 is for .onnx"),
        (["--output", "graph.onnx", "--int8", "--dtype", "bfloat16"], "not of torch.bfloat16"),
        (["--output", "graph.pt2", "--num-image-tokens", "37"], f"from 1 to {NUM_PATCHES}"),
    ],
)
def test_the_command_says_what_it_wrote_or_what_is_wrong(tmp_path, capsys, monkeypatch, options, message):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["export", "--model-path", str(tmp_path)]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert main([*command, "--output", "graph.pt2", "--num-image-tokens", "4"]) == 0
    assert "image_tokens (1, 4, " in capsys.readouterr().out and (tmp_path / "graph.pt2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last_step"),
    [
        ("graph.pt2", "torch.export.save"),
        ("graph.onnx", "onnxruntime.quantization.quantize_dynamic"),
        ("graph.xml", "openvino.save_model"),
    ],
)
def test_an_earlier_file_stays_whole_until_the_new_one_is(tmp_path, monkeypatch, name, last_step):
    def fill_the_disk(*arguments, **options):
        path = next(argument for argument in arguments if str(argument).endswith(name))
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / name).write_text("good")
    monkeypatch.setattr(last_step, fill_the_disk)
    with pytest.raises(OSError, match="full"):
        export_image_tokens(make_model(), tmp_path / name, 9, int8=name == "graph.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["good"]
