//! BLIP's own checkpoints (`.pth` files of github.com/salesforce/BLIP): what their tensors are called in Hugging Face's layout, and what
//! config they have. The names are those of `convert_blip_original_pytorch_to_hf.py` in transformers.

use std::path::Path;

use crate::config::{MedConfig, TextConfig, VisionConfig};
use crate::error::{ModelError, Result};
use crate::weights::Weights;

/// The vision transformer in BLIP's files.
const VISION: &str = "visual_encoder.";
/// What only training needs: momentum encoders, queues of features, the temperature.
const TRAINING: [&str; 9] = [
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "image_queue",
    "text_queue",
    "idx_queue",
    "ptr_queue",
    "queue_ptr",
];
const TEMPERATURE: &str = "temp";

/// The width of a head in every public BLIP.
const HEAD_WIDTH: usize = 64;
/// The epsilon of BLIP's vision transformer (`models/vit.py`); the files that transformers converted say 1e-5.
const VISION_EPS: f64 = 1e-6;
/// BERT's 30,522 tokens, `[DEC]` and `[ENC]`.
const VOCABULARY: usize = 30_524;

/// True if the names are those of BLIP's own files.
#[must_use]
pub(crate) fn is_original(weights: &Weights) -> bool {
    weights.tensors().any(|(name, _)| name.starts_with(VISION))
}

/// The name in Hugging Face's layout of a tensor of BLIP's own files; none for what only training needs.
#[must_use]
pub(crate) fn translate(name: &str) -> Option<String> {
    if name == TEMPERATURE || TRAINING.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    let Some(rest) = name.strip_prefix(VISION) else { return Some(name.to_owned()) };
    let moved = [
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("norm.", "post_layernorm."),
    ];
    for (old, new) in moved {
        if let Some(rest) = rest.strip_prefix(old) {
            return Some(format!("vision_model.{new}{rest}"));
        }
    }
    let Some(block) = rest.strip_prefix("blocks.") else { return Some(name.to_owned()) };
    let block = block
        .replace(".norm", ".layer_norm")
        .replace(".attn.proj.", ".self_attn.projection.")
        .replace(".attn.qkv.", ".self_attn.qkv.");
    Some(format!("vision_model.encoder.layers.{block}"))
}

/// The config of weights in Hugging Face's names that came without one, from their shapes. It is found for the public models, and for
/// others with heads of 64 and BLIP's vocabulary.
///
/// # Errors
/// The shapes leave it open; `folder` is then told to need a `config.json`.
pub(crate) fn infer_config(weights: &Weights, folder: &Path) -> Result<MedConfig> {
    infer(&|name| weights.get(name).map(|stored| stored.shape().to_vec())).map_err(|what| {
        let folder = folder.display();
        ModelError::Config(format!("{folder} has no config.json, and its weights do not tell all of it: {what}; add the file"))
    })
}

fn infer(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> std::result::Result<MedConfig, String> {
    let size = |name: &str, dimension: usize| {
        let found = shape(name).and_then(|shape| shape.get(dimension).copied()).filter(|n| *n > 0);
        found.ok_or_else(|| format!("there is no tensor {name} with {} dimensions", dimension + 1))
    };
    let count = |name: &dyn Fn(usize) -> String| (0..).take_while(|number| shape(&name(*number)).is_some()).count();
    let heads = |what: &str, width: usize| match width % HEAD_WIDTH {
        0 => Ok(width / HEAD_WIDTH),
        _ => Err(format!("how many heads the {what} transformer of width {width} has")),
    };

    let vision_width = size("vision_model.embeddings.class_embedding", 2)?;
    let patch_size = size("vision_model.embeddings.patch_embedding.weight", 2)?;
    let patches = size("vision_model.embeddings.position_embedding", 1)? - 1;
    let grid = patches.isqrt();
    if grid * grid != patches {
        return Err(format!("{patches} patches are no square"));
    }
    let vision_config = VisionConfig {
        hidden_size: vision_width,
        intermediate_size: size("vision_model.encoder.layers.0.mlp.fc1.weight", 0)?,
        num_hidden_layers: count(&|n| format!("vision_model.encoder.layers.{n}.mlp.fc1.weight")),
        num_attention_heads: heads("vision", vision_width)?,
        image_size: grid * patch_size,
        patch_size,
        layer_norm_eps: VISION_EPS,
        ..VisionConfig::default()
    };

    let words = |bert: &str| format!("{bert}.embeddings.word_embeddings.weight");
    let bert = if shape(&words("text_decoder.bert")).is_some() { "text_decoder.bert" } else { "text_encoder" };
    let (vocab_size, text_width) = (size(&words(bert), 0)?, size(&words(bert), 1)?);
    if vocab_size != VOCABULARY {
        return Err(format!("which of {vocab_size} tokens start and end a text"));
    }
    let text_config = TextConfig {
        vocab_size,
        hidden_size: text_width,
        intermediate_size: size(&format!("{bert}.encoder.layer.0.intermediate.dense.weight"), 0)?,
        num_hidden_layers: count(&|n| format!("{bert}.encoder.layer.{n}.intermediate.dense.weight")),
        num_attention_heads: heads("text", text_width)?,
        max_position_embeddings: size(&format!("{bert}.embeddings.position_embeddings.weight"), 0)?,
        ..TextConfig::default()
    };
    let image_text_hidden_size = size("vision_proj.weight", 0).unwrap_or(MedConfig::default().image_text_hidden_size);
    let config = MedConfig { vision_config, text_config, image_text_hidden_size, ..MedConfig::default() };
    config.checked().map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::med::Parts;
    use crate::parameters::parameters;
    use std::collections::BTreeMap;

    fn shapes(config: &MedConfig, parts: Parts) -> BTreeMap<String, Vec<usize>> {
        parameters(config, parts).unwrap().into_iter().map(|p| (p.name, p.shape)).collect()
    }

    #[test]
    fn the_configs_of_the_public_models_are_told_by_their_shapes() {
        let mut base = MedConfig::base();
        base.vision_config.layer_norm_eps = 1e-6;
        let mut large = base.clone();
        large.vision_config = VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            image_size: 224,
            ..large.vision_config
        };
        for config in [base, large.checked().unwrap()] {
            for parts in [Parts::CAPTIONER, Parts::FILTER, Parts::FULL] {
                let shapes = shapes(&config, parts);
                assert_eq!(infer(&|name| shapes.get(name).cloned()).unwrap(), config);
            }
        }
    }

    #[test]
    fn what_shapes_leave_open_is_told() {
        let whole = shapes(&MedConfig::base(), Parts::FILTER);
        let after = |name: &str, shape: &[usize]| {
            let mut shapes = whole.clone();
            shapes.insert(name.to_owned(), shape.to_vec());
            infer(&|name| shapes.get(name).cloned()).unwrap_err()
        };
        assert!(after("text_encoder.embeddings.word_embeddings.weight", &[30_000, 768]).contains("which of 30000 tokens"));
        assert!(after("text_encoder.embeddings.word_embeddings.weight", &[30_524, 100]).contains("how many heads the text"));
        assert!(after("vision_model.embeddings.position_embedding", &[1, 570, 768]).contains("569 patches"));
        assert!(after("vision_model.embeddings.class_embedding", &[]).contains("class_embedding"));
        assert!(infer(&|_| None).is_err());
    }

    #[test]
    fn names_of_the_text_side_stay_and_training_is_left_out() {
        for (old, new) in [
            ("visual_encoder.blocks.11.attn.proj.weight", Some("vision_model.encoder.layers.11.self_attn.projection.weight")),
            ("visual_encoder.blocks.0.norm1.bias", Some("vision_model.encoder.layers.0.layer_norm1.bias")),
            ("visual_encoder.norm.bias", Some("vision_model.post_layernorm.bias")),
            ("visual_encoder.patch_embed.proj.bias", Some("vision_model.embeddings.patch_embedding.bias")),
            ("text_decoder.cls.predictions.bias", Some("text_decoder.cls.predictions.bias")),
            ("itm_head.weight", Some("itm_head.weight")),
            ("visual_encoder_m.cls_token", None),
            ("text_queue", None),
            ("temp", None),
        ] {
            assert_eq!(translate(old).as_deref(), new, "{old}");
        }
    }
}
