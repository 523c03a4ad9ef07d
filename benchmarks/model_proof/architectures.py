"""The table: every decoder architecture of vLLM's registry that can be tried, by family."""

from . import allowances, parts
from .allowances import AS_LLAMA, BFLOAT16, NATIVE_ROPE, NO_PREFIXES, ONE_MORE, UNBIASED
from .checkpoint import Architecture
from .conversions import with_experts_as_published
from .parts import CLASSES, GRANITE, HALF_ROPE, LOCAL_MOE, MLA, MOE, NO_WINDOW, ROUTED_MOE, SCALED_QUERIES, SLIDING
from .rows import causal, classifies, embeds, latent, of, row, shared, shared_config, with_images, with_video

ARCHITECTURES: list[Architecture] = [
    # Llama.
    shared("llama", "Llama", "Llama 1, 2, 3, Yi, DeepSeek-Coder, SmolLM2, Tulu"),
    shared("llama3-rope", "Llama", "Llama 3.1, 3.2, 3.3", variant="llama3 RoPE"),
    shared("yarn-rope", "Llama", "Yarn-Llama-2", variant="yarn RoPE"),
    shared("llama-mqa", "Llama", "models with one head of keys", variant="multi-query"),
    embeds("Llama", "embedding models of Llama's"),
    embeds("LlamaBidirectional", "llama-nemotron-embed", {"pooling": "avg"}, config="Llama", **allowances.BOTH_WAYS),
    classifies("Llama", "Skywork-Reward, Llama classifiers", CLASSES),
    causal("Llama4", "Llama 4 Scout, Maverick", parts.LLAMA4, config="Llama4Text"),
    causal(
        "Llama4",
        "Llama 4 without chunked attention",
        parts.LLAMA4_NO_CHUNKS,
        config="Llama4Text",
        variant="no chunks",
        **allowances.NO_CHUNKS,
    ),
    with_images("Llama4", "Llama 4 Scout, Maverick with images", of("Llama4Text", parts.LLAMA4), parts.LLAMA4_VISION),
    with_images("Llava", "LLaVA 1.5", of("Llama"), parts.CLIP),
    with_video("LlavaNextVideo", "LLaVA-NeXT-Video", of("Llama"), parts.CLIP),
    with_images("Idefics3", "Idefics3", of("Llama"), parts.IDEFICS3),
    with_images("SmolVLM", "SmolVLM, SmolVLM2", of("Llama"), parts.SMOLVLM),
    # Llama by other names, or with weights laid out otherwise.
    causal("InternLM3", "InternLM3-8B", **AS_LLAMA),
    causal("IQuestCoder", "IQuest-Coder 40B", **AS_LLAMA),
    causal("LLaMA", "first conversions of Llama 1", **AS_LLAMA),
    causal("TeleChat3", "TeleChat3", **AS_LLAMA),
    causal("InternLM2", "InternLM2, InternLM2.5", **allowances.LLAMA_PACKED),
    causal("Exaone", "EXAONE 3.0, 3.5, Deep", **allowances.LLAMA_RENAMED),
    causal("Solar", "Solar Pro", **allowances.LLAMA_UNSKIPPED),
    causal("PanguEmbedded", "openPangu Embedded 1B, 7B", parts.BIASES, **allowances.LLAMA_BIASED),
    # Mistral.
    shared("mistral", "Mistral", "Mistral 7B v0.2 and v0.3, Mistral Nemo, Codestral"),
    causal("Mixtral", "Mixtral 8x7B, 8x22B", LOCAL_MOE),
    causal("Ministral3", "Ministral 3, Devstral 2", parts.MINISTRAL3, **allowances.LLAMA_4_SCALING),
    embeds("Mistral", "E5-Mistral-7B, Linq-Embed, SFR-Embedding", NO_WINDOW),
    with_images("Mistral3", "Mistral Small 3.1, 3.2, Magistral", of("Mistral", NO_WINDOW), parts.PIXTRAL),
    with_images("LlavaNext", "LLaVA 1.6", of("Mistral", NO_WINDOW), parts.CLIP),
    # Qwen.
    shared("qwen2", "Qwen2", "Qwen2, Qwen2.5, QwQ-32B, DeepSeek-R1-Distill-Qwen"),
    causal("MiMo", "MiMo-7B", **allowances.AS_QWEN2),
    causal("Qwen2Moe", "Qwen1.5-MoE, Qwen2-57B-A14B", MOE, parts.SHARED_EXPERT),
    embeds("Qwen2", "gte-Qwen2 (causal)"),
    classifies("Qwen2", "Qwen2 classifiers, mxbai-rerank", CLASSES),
    with_video("Qwen2VL", "Qwen2-VL", of("Qwen2VLText", parts.AXES), parts.QWEN2_VISION),
    with_video("Qwen2_5_VL", "Qwen2.5-VL, UI-TARS", of("Qwen2_5_VLText", parts.AXES), parts.QWEN2_5_VISION),
    with_video("LlavaOnevision", "LLaVA-OneVision", of("Qwen2"), parts.SIGLIP),
    shared("qwen3", "Qwen3", "Qwen3 0.6B to 32B"),
    causal("Qwen3", "Qwen3 as its card says for long texts", {"rope_parameters": parts.YARN}, variant="yarn RoPE"),
    causal("Qwen3Moe", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder", MOE),
    causal("Qwen3", "Qwen3-Embedding", variant="embeddings", task="embed", engine={"convert": "embed"}),
    classifies("Qwen3", "Qwen3-Reranker, converted", CLASSES),
    with_video("Qwen3VL", "Qwen3-VL 2B to 32B", of("Qwen3VLText", parts.AXES), parts.QWEN3_VISION),
    with_video(
        "Qwen3VLMoe",
        "Qwen3-VL-30B-A3B, 235B-A22B",
        of("Qwen3VLMoeText", parts.QWEN3_VL_MOE),
        parts.QWEN3_VISION,
        convert=with_experts_as_published,
    ),
    with_video("InternVL", "InternVL 3, 3.5 (HF)", of("Qwen3"), parts.INTERNVL),
    causal("Qwen3Next", "Qwen3-Next-80B-A3B, Qwen3-Coder-Next", parts.QWEN3_NEXT, **BFLOAT16),
    causal("Qwen3_5", "Qwen3.5 without images", parts.QWEN3_5, config="Qwen3_5Text", **BFLOAT16),
    causal("Qwen3_5Moe", "Qwen3.5 MoE without images", parts.QWEN3_5_MOE, config="Qwen3_5MoeText", **BFLOAT16),
    with_video("Qwen3_5", "Qwen3.5 0.8B to 27B", of("Qwen3_5Text", parts.QWEN3_5), parts.QWEN3_5_VISION, **BFLOAT16),
    with_video(
        "Qwen3_5Moe",
        "Qwen3.5-35B-A3B, 397B-A17B",
        of("Qwen3_5MoeText", parts.QWEN3_5_MOE),
        parts.QWEN3_5_VISION,
        **BFLOAT16,
    ),
    # Gemma.
    shared("gemma", "Gemma", "Gemma, CodeGemma"),
    with_images("PaliGemma", "PaliGemma", shared_config("gemma"), parts.SIGLIP, {"projection_dim": 64}),
    shared("gemma2", "Gemma2", "Gemma 2"),
    embeds("Gemma2", "BGE-Multilingual-Gemma2", SLIDING, SCALED_QUERIES),
    causal("VaultGemma", "VaultGemma 1B", SLIDING, SCALED_QUERIES),
    shared("gemma3", "Gemma3", "Gemma 3 270M, 1B"),
    embeds("Gemma3Text", "EmbeddingGemma", SLIDING, SCALED_QUERIES, {"use_bidirectional_attention": True}),
    with_images(
        "Gemma3", "Gemma 3 4B, 12B, 27B, MedGemma", shared_config("gemma3"), parts.SIGLIP, {"mm_tokens_per_image": 4}
    ),
    causal("Gemma3n", "Gemma 3n E2B, E4B, text", parts.GEMMA3N, config="Gemma3nText"),
    causal("Gemma4", "Gemma 4 E2B, E4B, text", parts.GEMMA4, config="Gemma4Text"),
    causal("Gemma4", "Gemma 4 26B-A4B, text", parts.GEMMA4_MOE, config="Gemma4Text", variant="MoE"),
    # Phi.
    shared("phi", "Phi", "Phi-1, 1.5, 2"),
    shared("phi3", "Phi3", "Phi-3, Phi-3.5, Phi-4, with 4K"),
    shared("longrope", "Phi3", "Phi-3 and 3.5 with 128K, Phi-4-mini", variant="longrope"),
    causal("PhiMoE", "Phi-3.5-MoE", LOCAL_MOE, parts.BIASES, config="Phimoe", **allowances.NO_HEAD_BIAS),
    # gpt-oss.
    shared("sinks", "GptOss", "gpt-oss-20b, 120b"),
    # Cohere.
    shared("cohere", "Cohere", "Command R, Aya 23"),
    causal("Cohere2", "Command R7B, Command A", SLIDING, **ONE_MORE),
    causal("Cohere2Moe", "Command MoE", SLIDING, parts.EXPERTS, **ONE_MORE),
    with_images(
        "Cohere2Vision",
        "Command A Vision",
        of("Cohere2", SLIDING),
        parts.SIGLIP,
        {"alignment_intermediate_size": 64},
        **ONE_MORE,
    ),
    # GLM.
    causal("Glm", "GLM-4-9B-hf, GLM-Edge", HALF_ROPE),
    shared("glm4", "Glm4", "GLM-4-0414"),
    causal("Glm4Moe", "GLM-4.5, 4.6, 4.7, GLM-4.5-Air", parts.GLM4_MOE),
    with_video("Glm4v", "GLM-4.1V, GLM-4.6V-Flash", of("Glm4vText", parts.GLM_AXES, parts.BIASES), parts.GLM_VISION),
    with_video("Glm4vMoe", "GLM-4.5V, 4.6V", of("Glm4vMoeText", parts.GLM4V_MOE), parts.GLM_VISION),
    with_video("GlmOcr", "GLM-OCR", of("GlmOcrText", parts.GLM_AXES), parts.GLM_VISION),
    # Granite.
    causal("Granite", "Granite 3.0 to 3.3", GRANITE),
    causal("GraniteSWA", "Granite with sliding windows", GRANITE, SLIDING),
    causal("GraniteMoe", "Granite 3 1B-A400M, 3B-A800M", GRANITE, LOCAL_MOE),
    causal("GraniteMoeShared", "Granite MoE with shared experts", GRANITE, LOCAL_MOE, parts.SHARED_MLP),
    causal("GraniteMoeSWA", "Granite MoE with sliding windows", GRANITE, LOCAL_MOE, SLIDING, parts.SHARED_MLP),
    causal("GraniteMoeHybrid", "Granite 4.0 Micro (attention alone)", parts.GRANITE_MICRO, variant="RoPE"),
    causal("GraniteMoeHybrid", "Granite 4.0 H", parts.GRANITE_H),
    causal("HyperCLOVAX", "HyperCLOVA X SEED Think", GRANITE),
    causal("MiniCPM", "MiniCPM 1B, 2B, MiniCPM4", GRANITE, {"attention_multiplier": 32**-0.5}, **allowances.AS_GRANITE),
    # OLMo.
    causal("Olmo", "OLMo 1B, 7B"),
    causal("Olmo2", "OLMo 2"),
    causal("Olmo3", "OLMo 3", SLIDING),
    causal("Olmoe", "OLMoE-1B-7B", parts.EXPERTS),
    causal("FlexOlmo", "FlexOlmo", parts.EXPERTS),
    causal("OlmoHybrid", "OLMo Hybrid", parts.GATED_DELTA, parts.default_rope()),
    # EXAONE.
    causal("Exaone4", "EXAONE 4.0 1.2B", parts.ALL_FULL, variant="without sliding windows"),
    causal("Exaone4", "EXAONE 4.0 32B", SLIDING),
    causal("ExaoneMoe", "K-EXAONE", parts.K_EXAONE),
    with_video("Exaone4_5_", "EXAONE 4.5", of("Exaone4", SLIDING), parts.EXAONE_VISION),
    # Falcon.
    causal("Falcon", "Falcon 7B, 11B, 40B, 180B", parts.FALCON, without={"head_dim"}),
    causal("Falcon", "Falcon-RW", {"alibi": True}, without={"head_dim"}, variant="ALiBi"),
    causal("FalconH1", "Falcon-H1", parts.FALCON_H1, **NO_PREFIXES),
    causal("FalconMamba", "Falcon Mamba", without={"intermediate_size"}),
    # Hunyuan.
    causal("HunYuanDenseV1", "Hunyuan 0.5B to 7B, Hunyuan-MT"),
    causal("HunYuanMoEV1", "Hunyuan-A13B", parts.HUNYUAN_MOE),
    causal("HYV3", "Hunyuan 3", parts.HUNYUAN3),
    # ERNIE.
    causal("Ernie4_5", "ERNIE 4.5 0.3B"),
    causal("Ernie4_5_Moe", "ERNIE 4.5 21B-A3B, 300B-A47B", parts.ERNIE_MOE, **UNBIASED),
    with_video("PaddleOCRVL", "PaddleOCR-VL", of("PaddleOCRText", parts.AXES), parts.VISION),
    # StableLM.
    causal("StableLm", "StableLM 2, StableLM-3B-4E1T, Stable Code", {"use_qkv_bias": True}, parts.QUARTER_ROPE),
    causal("Orion", "Orion-14B", parts.WHOLE_ROPE, **allowances.AS_STABLELM),
    # Nemotron.
    causal("Nemotron", "Nemotron-4, Minitron"),
    causal("NemotronH", "Nemotron-H, Nemotron Nano 2 and 3", parts.NEMOTRON_H, without={"num_hidden_layers"}),
    # LFM.
    causal("Lfm2", "LFM2 350M to 2.6B", parts.LFM2, parts.CONVOLUTIONS, **NATIVE_ROPE),
    causal("Lfm2Moe", "LFM2-8B-A1B", MOE, parts.CONVOLUTIONS, {"num_dense_layers": 1}, unbiased=True, **NATIVE_ROPE),
    with_images(
        "Lfm2Vl",
        "LFM2-VL",
        of("Lfm2", parts.LFM2_OF_VL),
        parts.SIGLIP2,
        {"projector_hidden_size": 64},
        **allowances.NATIVE_ROPE_NO_IMAGES,
    ),
    # Others with RoPE.
    causal("Starcoder2", "StarCoder2", NO_WINDOW),
    causal("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    causal("SeedOss", "Seed-OSS-36B", parts.BIASES),
    causal("Apertus", "Apertus 8B, 70B", **allowances.XIELU),
    causal("Arcee", "AFM-4.5B"),
    causal("Cwm", "Code World Model", SLIDING),
    causal("Jais2", "Jais 2"),
    causal("Mellum", "Mellum 2", SLIDING, MOE),
    causal("Afmoe", "Trinity Nano, Mini, Large", parts.AFMOE),
    causal("MiniMaxM2", "MiniMax-M2", parts.MINIMAX, **allowances.ROUTING_BIAS),
    causal("Dbrx", "DBRX", parts.DBRX, without={"head_dim", "num_key_value_heads", "intermediate_size"}),
    causal("HrmText", "HRM-Text", parts.HRM),
    causal("Laguna", "Laguna", parts.LAGUNA),
    causal("MiMoV2Flash", "MiMo-V2-Flash", parts.MIMO_V2, **allowances.MIMO_V2),
    causal("GPTNeoX", "Pythia, GPT-NeoX-20B, Dolly v2", parts.QUARTER_ROPE, without={"num_key_value_heads"}),
    causal("GPTJ", "GPT-J-6B", parts.GPTJ, without={"num_key_value_heads", "head_dim"}, **allowances.TABLE_OF_256),
    causal("Zamba2", "Zamba2, where use_mem_rope is set", parts.ZAMBA2, without={"head_dim"}, **NO_PREFIXES),
    with_images("Aria", "Aria", of("AriaText", parts.ARIA), parts.IDEFICS3),
    # No RoPE.
    causal("Bloom", "BLOOM, BLOOMZ", {"n_layer": 3, "n_head": 4}, without={"num_key_value_heads"}),
    causal("OPT", "OPT", {"ffn_dim": 96}, without={"num_key_value_heads"}),
    row("LMHeadModel", "GPT2", "GPT-2", parts.INNER, without={"num_key_value_heads", "intermediate_size"}),
    causal("GPTBigCode", "StarCoder, SantaCoder", parts.INNER, without={"num_key_value_heads", "intermediate_size"}),
    causal("Mamba", "Mamba", without={"intermediate_size"}),
    causal("Mamba2", "Mamba-2, Codestral Mamba", parts.MAMBA2, without={"intermediate_size"}),
    causal("Jamba", "Jamba 1.5, 1.6, 1.7, Jamba Reasoning", parts.JAMBA),
    # Multi-head latent attention: keys that cannot be rotated anew.
    latent("DeepseekV2", "DeepSeek-V2, V2-Lite, V2.5", ROUTED_MOE, MLA, {"q_lora_rank": None}),
    latent("DeepseekV3", "DeepSeek-V3, R1, V3.1, Kimi-K2", ROUTED_MOE, MLA),
    latent("DeepseekV32", "DeepSeek-V3.2", ROUTED_MOE, MLA),
    latent("AXK1", "A.X K1", ROUTED_MOE, MLA),
    latent("Glm4MoeLite", "GLM-4.7-Flash", ROUTED_MOE, MLA),
    latent("GlmMoeDsa", "GLM-5", ROUTED_MOE, MLA),
    latent("MiniCPM3", "MiniCPM3-4B", MLA),
    latent(
        "LongcatFlash", "LongCat-Flash", parts.LONGCAT, without={"head_dim", "intermediate_size", "num_hidden_layers"}
    ),
]

BY_TITLE = {one.title: one for one in ARCHITECTURES}
