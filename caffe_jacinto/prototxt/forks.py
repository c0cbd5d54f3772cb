"""Layers and fields that one Caffe has and another lacks: who knows them, what stock Caffe has instead.

The one table of them. What is not in the schema either (forks.proto adds what this project computes) is an
error that names the fork.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

DEPTHWISE = ("ConvolutionDepthwise", "DepthwiseConvolution")
"""Types of convolutions that have a filter of their own for each channel, whatever their ``group`` says."""

SSD, SEGNET, YOLO = "SSD", "SegNet", "MobileNet-YOLO"
_CAFFE_JACINTO, _FAST_RCNN, _RFCN = "NVCaffe and caffe-jacinto", "Fast R-CNN", "R-FCN"
_DEEPLAB, _SHUFFLENET, _INTEL = "DeepLab", "ShuffleNet's forks", "Intel's Caffe"
_CPM, _FLOWNET = "the forks for pose estimation (CPM)", "FlowNet's Caffe"
_STOCK = "stock Caffe 1.0"
_OURS = "this program's engine on PyTorch"

FIELDS: dict[str, str] = {
    "ceil_mode": "forks with pull request 3057 of BVLC/caffe",
    "bn_param": "SegNet, ENet and PSPNet",
    "permute_param": SSD,
    "norm_param": SSD,
    "shuffle_channel_param": _SHUFFLENET,
    "interp_param": f"{_DEEPLAB} and PSPNet",
    "upsample_param": f"{SEGNET} and forks for YOLO",
    **dict.fromkeys(
        (
            *("warmup_iter", "ema_decay", "image_size", "crop_min_area", "crop_max_aspect"),
            *("random_brightness", "random_contrast", "random_saturation", "mixup_alpha"),
            "distillation_param",
        ),
        _OURS,
    ),
    # From here on, fields that nothing here computes.
    **dict.fromkeys(
        (
            *("annotated_data_param", "multibox_loss_param", "prior_box_param", "detection_output_param"),
            *("detection_evaluate_param", "video_data_param", "resize_param", "noise_param", "distort_param"),
            *(
                "expand_param",
                "emit_constraint",
                "crop_h",
                "crop_w",
                "eval_type",
                "ap_version",
                "show_per_class_result",
            ),
        ),
        SSD,
    ),
    **dict.fromkeys(("dense_image_data_param", "sample_weights_test", "weight_by_label_freqs"), SEGNET),
    "class_weighting": SEGNET,
    **dict.fromkeys(("roi_pooling_param", "smooth_l1_loss_param"), _FAST_RCNN),
    **dict.fromkeys(("psroi_pooling_param", "box_annotator_ohem_param"), _RFCN),
    **dict.fromkeys(
        ("region_loss_param", "yolov3_param", "yolo_detection_output_param", "eval_detection_param"), YOLO
    ),
    **dict.fromkeys(("yolov3_detection_output_param", "reorg_param"), YOLO),
    **dict.fromkeys(
        ("scale_bias", "quantization_param", "image_label_data_param", "parser_threads", "quantize"),
        _CAFFE_JACINTO,
    ),
    **dict.fromkeys(
        (
            *("sparse_mode", "display_sparsity", "sparsity_target", "sparsity_start_iter"),
            *("sparsity_step_iter", "sparsity_step_factor", "sparsity_start_factor"),
            *("sparsity_threshold_maxratio", "sparsity_threshold_value_max"),
        ),
        "caffe-jacinto",
    ),
    **dict.fromkeys(("mat_read_param", "mat_write_param", "densecrf_param", "label_type"), _DEEPLAB),
    **dict.fromkeys(("multinode", "mn_activation_param", "spatial_dropout_param"), _INTEL),
    **dict.fromkeys(("cpmdata_param", "cpm_transform_param", "imresize_param"), _CPM),
    **dict.fromkeys(("augmentation_param", "correlation_param", "coeff_schedule_param"), _FLOWNET),
    **dict.fromkeys(("resample_param", "l1_loss_param", "flow_warp_param", "mean_param"), _FLOWNET),
    **dict.fromkeys(("center_loss_param", "large_margin_inner_product_param"), "forks for face recognition"),
    "mish_param": "forks for YOLO",
    "channel_shuffle_param": _SHUFFLENET,
    "deformable_convolution_param": "forks with deformable convolutions",
    "focal_loss_param": "forks with focal loss",
    "lstm_param": "junhyukoh's caffe-lstm",
    "margin_inner_product_param": "SphereFace",
    "triplet_loss_param": "forks for face recognition",
    "st_param": "forks with a spatial transformer",
}
"""The forks that know a field which stock Caffe lacks, by its name."""


@dataclass(frozen=True)
class ForkType:
    """A type of layer that a dialect lacks."""

    fork: str
    instead: str = ""
    """What stock Caffe computes the same with, if it can."""

    field: str = ""
    """Its own parameters: a dialect whose schema has them has the type."""

    def advice(self, own: Collection[str]) -> str:
        """What to write instead in a dialect whose schema has the fields ``own``; empty: nothing is known."""
        other = TYPES.get(self.instead.partition(" ")[0])
        known = self.instead and (other is None or other.field in own)
        return f"write {self.instead} instead" if known else ""


TYPES: dict[str, ForkType] = {
    "Axpy": ForkType("SENet"),
    "BN": ForkType(FIELDS["bn_param"], "BatchNorm and Scale"),
    "ConvolutionDepthwise": ForkType(_SHUFFLENET, "Convolution with group"),
    "DistillationLoss": ForkType(_OURS),
    "DepthwiseConvolution": ForkType("forks for MobileNet", "Convolution with group"),
    "Interp": ForkType(FIELDS["interp_param"]),
    "Normalize": ForkType(SSD, field="norm_param"),
    "Permute": ForkType(SSD, field="permute_param"),
    "ReLU6": ForkType("forks for MobileNet v2", "Clip with min 0 and max 6"),
    "ShuffleChannel": ForkType(_SHUFFLENET),
    "Upsample": ForkType(FIELDS["upsample_param"]),
    # Of these, caffe-jacinto has none.
    "Clip": ForkType(_STOCK, field="clip_param"),
    "Parameter": ForkType(_STOCK, field="parameter_param"),
    "Swish": ForkType(_STOCK, field="swish_param"),
    # From here on, types that nothing here computes.
    "AnnotatedData": ForkType(SSD, field="annotated_data_param"),
    "DetectionEvaluate": ForkType(SSD, field="detection_evaluate_param"),
    "DetectionOutput": ForkType(SSD, field="detection_output_param"),
    "MultiBoxLoss": ForkType(SSD, field="multibox_loss_param"),
    "PriorBox": ForkType(SSD, field="prior_box_param"),
    "DenseImageData": ForkType(SEGNET),
    "ROIPooling": ForkType(_FAST_RCNN),
    "SmoothL1Loss": ForkType(_FAST_RCNN),
    "PSROIPooling": ForkType(_RFCN),
    "RegionLoss": ForkType(YOLO),
    "Yolov3": ForkType(YOLO),
    "Reorg": ForkType(YOLO),
    "Mish": ForkType("forks for YOLO"),
    "CuDNNBatchNorm": ForkType("forks with NVIDIA's batch norm", "BatchNorm and Scale"),
    "Quantization": ForkType("caffe-jacinto", field="quantization_param"),
    "ImageLabelData": ForkType("caffe-jacinto", field="image_label_data_param"),
    "ChannelShuffle": ForkType(_SHUFFLENET),
    "DeformableConvolution": ForkType("forks with deformable convolutions"),
    "FocalLoss": ForkType("forks with focal loss"),
    "MarginInnerProduct": ForkType("SphereFace"),
    "TripletLoss": ForkType("forks for face recognition"),
    "CenterLoss": ForkType("forks for face recognition"),
    "SpatialTransformer": ForkType("forks with a spatial transformer"),
}
"""By LayerParameter.type."""

V1_FORKS = {name.upper(): found.fork for name, found in TYPES.items()}
"""The forks that know a type, by its name in capitals; the form V1 writes it with ``_`` between its words."""

LR_POLICIES: dict[str, str] = {"cosine": _OURS, "one_cycle": _OURS}
"""Learning-rate policies that stock Caffe and caffe-jacinto lack."""

INSTEAD: dict[tuple[str, bool], str] = {
    ("ceil_mode", False): "write round_mode: FLOOR instead",
    ("ceil_mode", True): "leave it out: stock Caffe rounds up",
}
"""What to do about a field with this value."""
