"""The families of transformers that continuous integration tries: of each kind of architecture the best known ones."""

SMOKE = (
    # decoders: plain, grouped heads, windows, soft caps, experts, parallel blocks, biases by distance
    "llama/causal-lm", "gpt2/causal-lm", "gemma2/causal-lm", "qwen3/causal-lm", "mistral/causal-lm",
    "mixtral/causal-lm", "deepseek_v3/causal-lm", "gpt_neox/causal-lm", "falcon/causal-lm", "bloom/causal-lm",
    "gptj/causal-lm",
    # states instead of attention
    "mamba/causal-lm", "mamba2/causal-lm", "rwkv/causal-lm", "recurrent_gemma/causal-lm",
    # encoders
    "bert/masked-lm", "albert/masked-lm", "deberta-v2/masked-lm", "mobilebert/masked-lm", "funnel/masked-lm",
    "fnet/masked-lm", "yoso/masked-lm",
    # encoders with decoders
    "t5/seq2seq", "bart/seq2seq", "m2m_100/seq2seq",
    # images
    "vit/image-classification", "convnext/image-classification", "resnet/image-classification",
    "mobilevit/image-classification", "segformer/image-classification", "detr/object-detection",
    "mask2former/universal-segmentation", "timesformer/video-classification", "vit_mae/pretraining",
    # images and text
    "llava/image-text-to-text", "qwen2_vl/image-text-to-text", "vilt/visual-question-answering",
    # sound and series
    "whisper/speech-seq2seq", "wav2vec2/ctc", "patchtst/base",
)  # fmt: skip
