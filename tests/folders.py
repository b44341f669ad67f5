"""Tiny random pipelines of diffusers with odd sizes, saved as folders: what tests compare with.

python -m tests.folders   writes the one that :debug configs use
"""

import diffusers
import torch
import transformers

from tests import test_fast

LATENT = 4  # channels of all autoencoders but those of 16
NEGATIVE = "a grey square"
PROMPTS = ["A red Circle", "two circles"]


def clip_tokenizer():
    return test_fast.clip(model_max_length=77, pad_token="<|endoftext|>")


def clip(width=20, depth=3, projected=0, act="quick_gelu"):
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=depth,
        num_attention_heads=2,
        projection_dim=projected or 12,
        hidden_act=act,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval(), tokenizer


def t5(width=24):
    tokenizer = test_fast.t5()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval(), tokenizer


def vae(channels=LATENT, **options):
    sizes = dict(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
    )
    return diffusers.AutoencoderKL(**sizes | options).eval()


def unet(width, **options):
    sizes = dict(
        sample_size=8,
        block_out_channels=(8, 12),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.UNet2DConditionModel(**sizes | options).eval()


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sd1():
    text, tokenizer = clip()
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    return diffusers.StableDiffusionPipeline(
        vae(), text, tokenizer, unet(20), scheduler, None, None, requires_safety_checker=False
    )


def sd2():
    text, tokenizer = clip(act="gelu")
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    net = unet(20, use_linear_projection=True, attention_head_dim=(2, 3))
    return diffusers.StableDiffusionPipeline(
        vae(), text, tokenizer, net, scheduler, None, None, requires_safety_checker=False
    )


def sdxl():
    one, tokenizer = clip()
    two, tokenizer_2 = clip(width=16, projected=12, act="gelu")
    net = unet(
        36,
        use_linear_projection=True,
        attention_head_dim=(2, 3),
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, steps_offset=1, timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(force_upcast=True), one, two, tokenizer, tokenizer_2, net, scheduler
    )


def pixart():
    text, tokenizer = t5()
    net = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=6,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=12,
        caption_channels=24,
        use_additional_conditions=False,
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return diffusers.PixArtSigmaPipeline(tokenizer, text, vae(), net, scheduler)


def sd3(with_t5=True):
    one, tokenizer = clip(width=12, projected=12)
    two, tokenizer_2 = clip(width=8, projected=8, act="gelu")
    three, tokenizer_3 = t5() if with_t5 else (None, None)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        net,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        *(one, tokenizer, two, tokenizer_2, three, tokenizer_3),
    )


def flux(guidance=True):
    one, tokenizer = clip(width=12)
    two, tokenizer_2 = t5()
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return diffusers.FluxPipeline(
        scheduler,
        vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        *(one, tokenizer, two, tokenizer_2),
        net,
    )


def save(make, folder, seed=0):
    """A pipeline and its folder."""
    torch.manual_seed(seed)
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "transformer"):
        net = getattr(pipe, name, None)
        for parameter in net.parameters() if net else ():
            if not parameter.abs().max():  # what starts at zero would hide mistakes
                torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(folder)
    return pipe


PIPELINES = {f.__name__: f for f in (sd1, sd2, sdxl, pixart, sd3, flux)}


if __name__ == "__main__":
    from t2i_jax.pretrained import folder

    save(sd1, folder.TINY)
