"""Which passes there are: name -> where it lives and one line about it.

Built-in passes are known as strings, so that listing them imports nothing heavy. Other packages add theirs
through the entry-point group `onnxopt.passes`:

    [project.entry-points."onnxopt.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from onnxopt.errors import UsageError

if TYPE_CHECKING:
    from onnxopt.contract import GraphPass

ENTRY_POINT_GROUP = "onnxopt.passes"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Where a pass is found.

    Attributes:
        name: Its name in pipelines.
        location: "module:Class".
        summary: One line.
        package: The distribution that registered it; empty for the built-in ones.
    """

    name: str
    location: str
    summary: str
    package: str = ""


def _entry(name: str, location: str, summary: str) -> tuple[str, Entry]:
    return name, Entry(name, f"onnxopt.passes.{location}", summary)


BUILTIN: dict[str, Entry] = dict(
    [
        _entry(
            "fold-constants",
            "simplify.fold_constants:FoldConstants",
            "Compute what does not depend on the inputs, without making the model bigger.",
        ),
        _entry(
            "settle-shapes",
            "simplify.settle_shapes:SettleShapes",
            "Replace shape arithmetic whose result is known.",
        ),
        _entry(
            "merge-layout",
            "simplify.merge_layout:MergeLayout",
            "Merge chains of Reshape, Transpose, Squeeze, Unsqueeze and Flatten.",
        ),
        _entry(
            "remove-identities",
            "simplify.remove_identities:RemoveIdentities",
            "Remove nodes that return their input unchanged.",
        ),
        _entry(
            "inline-functions",
            "simplify.inline_functions:InlineFunctions",
            "Replace calls of functions by what they compute, where that does not make the model bigger.",
        ),
        _entry(
            "inline-branches",
            "simplify.inline_branches:InlineBranches",
            "Replace an If whose condition is known, or makes no difference, by a branch.",
        ),
        _entry(
            "unroll-loops",
            "simplify.unroll_loops:UnrollLoops",
            "Replace a Loop that always runs the same few rounds by these rounds.",
        ),
        _entry(
            "merge-chains",
            "simplify.merge_chains:MergeChains",
            "Merge Cast, Pad and Slice with the one before, and reductions with Squeeze or Unsqueeze behind.",
        ),
        _entry(
            "unpack-sequences",
            "simplify.unpack_sequences:UnpackSequences",
            "Replace sequences that are only taken apart again by plain tensors.",
        ),
        _entry(
            "merge-concats",
            "simplify.merge_concats:MergeConcats",
            "Merge Concat with Concat, and with Split and Slice where one undoes the other.",
        ),
        _entry(
            "simplify-algebra",
            "simplify.simplify_algebra:SimplifyAlgebra",
            "Apply laws of arithmetic and logic, as far as they hold in floating point.",
        ),
        _entry(
            "drop-unused-outputs",
            "simplify.drop_unused_outputs:DropUnusedOutputs",
            "Leave out outputs that nothing uses.",
        ),
        _entry(
            "remove-dead-code",
            "simplify.remove_dead_code:RemoveDeadCode",
            "Remove nodes, initializers and functions that no output depends on.",
        ),
        _entry(
            "strip-metadata",
            "simplify.strip_metadata:StripMetadata",
            "Drop what exporters note about nodes, such as stack traces with the paths of source files.",
        ),
        _entry(
            "shorten-names",
            "simplify.shorten_names:ShortenNames",
            "Call inner values, weights and nodes by names of a few letters.",
        ),
        _entry(
            "merge-common-subexpressions",
            "simplify.merge_common_subexpressions:MergeCommonSubexpressions",
            "Compute once what is computed twice.",
        ),
        _entry(
            "deduplicate-initializers",
            "simplify.deduplicate_initializers:DeduplicateInitializers",
            "Store equal initializers once.",
        ),
        _entry(
            "fuse-batch-norm",
            "fuse.batch_norm:FuseBatchNorm",
            "Fuse scales and shifts per channel into the BatchNormalization before them.",
        ),
        _entry(
            "fuse-conv-bn",
            "fuse.conv_bn:FuseConvBatchNorm",
            "Fold BatchNormalization into the convolution before it.",
        ),
        _entry(
            "fuse-pad",
            "fuse.pad:FusePad",
            "Fold zeros around an image into the Conv or AveragePool behind them.",
        ),
        _entry(
            "fuse-linear",
            "fuse.linear:FuseLinear",
            "Fold what multiplies or adds per channel into Conv, ConvTranspose, Gemm and MatMul.",
        ),
        _entry(
            "fuse-activations",
            "fuse.activations:FuseActivations",
            "Fuse Clip, HardSigmoid, HardSwish, Sigmoid, SiLU and Softmax that are spelled out.",
        ),
        _entry(
            "fuse-conv-add",
            "fuse.conv_add:FuseConvAdd",
            "Add a residual, and activate, within the convolution before it.",
        ),
        _entry(
            "share-layout",
            "simplify.share_layout:ShareLayout",
            "Rearrange a tensor once instead of each of the parts it is split into.",
        ),
        _entry(
            "merge-parallel-linear",
            "fuse.merge_parallel:MergeParallelLinear",
            "Merge linear operators on the same input into one, for example query, key and value.",
        ),
        _entry(
            "merge-branches",
            "fuse.merge_branches:MergeBranches",
            "Merge Convs on the same input whose results are added up into one.",
        ),
        _entry(
            "merge-consecutive-linear",
            "fuse.merge_consecutive:MergeConsecutiveLinear",
            "Merge linear operators one behind the other where that costs less.",
        ),
        _entry(
            "fuse-exponentials",
            "fuse.exponentials:FuseExponentials",
            "Fuse Sigmoid and Softmax that are spelled out with Exp.",
        ),
        _entry(
            "unflatten-linear",
            "fuse.unflatten:UnflattenLinear",
            "Replace a Gemm between two Reshapes by MatMul and Add.",
        ),
        _entry(
            "fuse-gelu",
            "fuse.gelu:FuseGelu",
            "Fuse GELU in all exporters' forms.",
        ),
        _entry(
            "fuse-instance-norm",
            "fuse.instance_norm:FuseInstanceNorm",
            "Fuse instance normalization in all exporters' forms.",
        ),
        _entry(
            "fuse-group-norm",
            "fuse.group_norm:FuseGroupNorm",
            "Write group normalization in the form that ONNX Runtime executes fastest.",
        ),
        _entry(
            "fuse-normalization",
            "fuse.normalization:FuseNormalization",
            "Fuse layer and RMS normalization in all exporters' forms.",
        ),
        _entry(
            "simplify-masks",
            "simplify.simplify_masks:SimplifyMasks",
            "Simplify the arithmetic of attention masks, and drop NaN guards that never apply.",
        ),
        _entry(
            "fuse-attention",
            "fuse.attention:FuseAttention",
            "Fuse scaled dot-product attention in all exporters' forms.",
        ),
        _entry(
            "fuse-rotary",
            "fuse.rotary:FuseRotaryEmbedding",
            "Fuse rotary position embeddings in all exporters' forms.",
        ),
        _entry(
            "sum-residuals",
            "fuse.residuals:SumResiduals",
            "Add up residuals so that the runtime keeps its faster normalization.",
        ),
        _entry(
            "smooth-activations",
            "quantize.smooth_activations:SmoothActivations",
            "Even out the channels of activations, so that one 8-bit scale serves all of them.",
        ),
        _entry(
            "quantize-dynamic",
            "quantize.quantize_dynamic:QuantizeDynamic",
            "Multiply 8-bit integers: weights quantized ahead, activations while the model runs.",
        ),
        _entry(
            "quantize-weights",
            "quantize.quantize_weights:QuantizeWeights",
            "Store weights as integers of 8, 4 or 2 bits, per tensor, channel or block.",
        ),
        _entry(
            "convert-float16",
            "quantize.convert_float16:ConvertFloat16",
            "Compute in float16 on cuda, except where numbers would overflow.",
        ),
        _entry(
            "quantize-matmul",
            "quantize.quantize_matmul:QuantizeMatMul",
            "Compute products from weights of 2, 4 or 8 bits in blocks.",
        ),
        _entry(
            "store-float16",
            "quantize.store_float16:StoreFloat16",
            "Store float32 constants in 16 bits, at no cost when running.",
        ),
        _entry(
            "approximate-gelu",
            "quantize.approximate_gelu:ApproximateGelu",
            "Write GELU behind convolutions as x * sigmoid(1.702 x), which 8-bit integers can compute.",
        ),
        _entry(
            "quantize-static",
            "quantize.quantize_static:QuantizeStatic",
            "Compute convolutional nets with 8-bit integers, with ranges learnt from data.",
        ),
        _entry(
            "merge-channels",
            "prune.merge_channels:MergeChannels",
            "Replace channels, neurons and heads by multiples of others that do nearly the same.",
        ),
        _entry(
            "prune-channels",
            "prune.channels:PruneChannels",
            "Remove whole channels, heads, neurons and hidden units, with everything that depends on them.",
        ),
        _entry(
            "prune-layers",
            "prune.layers:PruneLayers",
            "Leave out the residual blocks that matter least, and fit what is left.",
        ),
        _entry(
            "prune-weights",
            "prune.prune_weights:PruneWeights",
            "Set the smallest weights to zero, by threshold, ratio or N:M.",
        ),
        # It runs models, which the passes in passes/ do not.
        (
            "graft",
            Entry(
                "graft",
                "onnxopt.graft.as_pass:Graft",
                "Put a part of another model in the place of a part of this one.",
            ),
        ),
    ]
)


@functools.cache
def entries() -> dict[str, Entry]:
    """Return every pass by name, built-in ones first; a built-in name cannot be taken over."""
    found = dict(BUILTIN)
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: (p.name, p.value)):
        package = point.dist.name if point.dist is not None else "?"
        found.setdefault(point.name, Entry(point.name, point.value, f"From the package {package}.", package))
    return found


def nearest(word: str, known: list[str]) -> str:
    """Return a suggestion such as ` Did you mean "fuse-conv-bn"?`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f' Did you mean "{close[0]}"?' if close else ""


def load(name: str) -> type[GraphPass]:
    """Import the class of a pass.

    Raises:
        UsageError: If there is no such pass, or what is registered is not one.
    """
    from onnxopt.contract import GraphPass

    entry = entries().get(name)
    if entry is None:
        raise UsageError(f'There is no pass "{name}".{nearest(name, list(entries()))} `onnxopt passes` lists them.')
    module, _, attribute = entry.location.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        origin = f" of the package {entry.package}" if entry.package else ""
        raise UsageError(f'The pass "{name}"{origin} cannot be imported from {entry.location}: {error}') from error
    if not (isinstance(found, type) and issubclass(found, GraphPass) and dataclasses.is_dataclass(found)):
        raise UsageError(f'{entry.location}, the pass "{name}", is not a dataclass derived from onnxopt.GraphPass.')
    return found
