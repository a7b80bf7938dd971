//! The configuration of a CLIP: `config.json` of Hugging Face's `CLIPConfig` and `SiglipConfig`, or OpenCLIP's `open_clip_config.json`.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{MAX_LAYERS, MAX_SIZE, VisionConfig};
use crate::error::{ModelError, Result};
use crate::files::{CONFIG, OPEN_CLIP_CONFIG, read_text};
use crate::ops::Activation;

/// How image and text are pooled and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClipFamily {
    /// CLIP (Radford et al. 2021, arXiv 2103.00020): class token, causal text pooled at its end.
    Clip,
    /// SigLIP (Zhai et al. 2023, arXiv 2303.15343): pooled by attention, bidirectional text pooled at the last position, a bias.
    Siglip,
}

/// The image side.
#[derive(Debug, Clone, PartialEq)]
pub enum ClipVision {
    /// A vision transformer.
    Vit(VisionConfig),
    /// CLIP's modified ResNet.
    ResNet(ResNetConfig),
}

/// A modified ResNet (`ModifiedResNet` of OpenAI's `clip/model.py`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResNetConfig {
    /// Bottleneck blocks of the four stages.
    pub layers: [usize; 4],
    /// Channels after the stem; the last stage has 32 times as many.
    pub width: usize,
    /// Heads of the attention pool.
    pub heads: usize,
    /// Side of the square input image in pixels.
    pub image_size: usize,
}

/// The text transformer (`text_config`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClipTextConfig {
    /// Number of rows of the token embedding.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Longest text in tokens (the context length).
    pub max_position_embeddings: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f64,
    /// The token whose state stands for the text. 2, which older files say and which no real text has, means the highest id of the text.
    pub eos_token_id: u32,
    /// Width of the text features of SigLIP; `hidden_size` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projection_size: Option<usize>,
}

/// A whole CLIP.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// How features are made and compared.
    pub family: ClipFamily,
    /// The image side.
    pub vision: ClipVision,
    /// The text side.
    pub text: ClipTextConfig,
    /// Width of the features that image and text share.
    pub projection_dim: usize,
}

impl ClipTextConfig {
    /// The defaults of `CLIPTextConfig` in transformers 5.
    #[must_use]
    pub fn clip() -> Self {
        Self {
            vocab_size: 49_408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49_407,
            projection_size: None,
        }
    }

    /// The defaults of `SiglipTextConfig` in transformers 5.
    #[must_use]
    pub fn siglip() -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 768,
            intermediate_size: 3072,
            num_attention_heads: 12,
            max_position_embeddings: 64,
            hidden_act: Activation::TanhGelu,
            layer_norm_eps: 1e-6,
            ..Self::clip()
        }
    }
}

impl VisionConfig {
    /// The defaults of `CLIPVisionConfig` in transformers 5.
    #[must_use]
    pub fn clip() -> Self {
        Self { image_size: 224, patch_size: 32, hidden_act: Activation::QuickGelu, ..Self::default() }
    }

    /// The defaults of `SiglipVisionConfig` in transformers 5.
    #[must_use]
    pub fn siglip() -> Self {
        Self { image_size: 224, hidden_act: Activation::TanhGelu, layer_norm_eps: 1e-6, ..Self::default() }
    }
}

impl ClipConfig {
    /// Reads and checks the config of a checkpoint directory: `config.json` if it is there, else `open_clip_config.json`.
    ///
    /// # Errors
    /// The file cannot be read, does not parse, or describes a model that cannot exist or is not implemented.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let open_clip = !dir.join(CONFIG).exists() && dir.join(OPEN_CLIP_CONFIG).exists();
        let path = dir.join(if open_clip { OPEN_CLIP_CONFIG } else { CONFIG });
        let text = read_text(&path)?;
        if open_clip { Self::from_open_clip(&text, &path) } else { Self::from_hugging_face(&text, &path) }
    }

    /// From the text of a `config.json` of `CLIPConfig` or `SiglipConfig`; missing keys take the defaults of transformers 5. `path` is
    /// for messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn from_hugging_face(text: &str, path: &Path) -> Result<Self> {
        let json = |source| ModelError::Json { path: path.to_owned(), source };
        let file: HuggingFaceFile = serde_json::from_str(text).map_err(json)?;
        let (vision, text_config, family) = match file.model_type.as_str() {
            "clip" => (VisionConfig::clip(), ClipTextConfig::clip(), ClipFamily::Clip),
            "siglip" => (VisionConfig::siglip(), ClipTextConfig::siglip(), ClipFamily::Siglip),
            other => return Err(ModelError::Config(format!("model_type is {other:?}, expected \"clip\" or \"siglip\""))),
        };
        // Where an old file has a `…_config_dict`, that one counts.
        let vision = overlay(&vision, file.vision_config_dict.or(file.vision_config)).map_err(json)?;
        let text = overlay(&text_config, file.text_config_dict.or(file.text_config)).map_err(json)?;
        let projection_dim = match family {
            ClipFamily::Clip => file.projection_dim,
            ClipFamily::Siglip => vision.hidden_size,
        };
        Self { family, vision: ClipVision::Vit(vision), text, projection_dim }.checked()
    }

    /// From the text of an `open_clip_config.json`, or of a file of OpenCLIP's `model_configs`; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_dir`]; a setting that is not implemented is named.
    pub fn from_open_clip(text: &str, path: &Path) -> Result<Self> {
        let json = |source| ModelError::Json { path: path.to_owned(), source };
        let mut whole: Value = serde_json::from_str(text).map_err(json)?;
        let model = whole.get_mut("model_cfg").map(Value::take).unwrap_or(whole);
        let OpenClipFile { embed_dim, quick_gelu, vision_cfg, text_cfg } = serde_json::from_value(model).map_err(json)?;
        let hidden_act = if quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
        let heads = |width: usize| width / vision_cfg.head_width.max(1);
        let vision = match vision_cfg.layers {
            OpenClipLayers::Transformer(count) => ClipVision::Vit(VisionConfig {
                hidden_size: vision_cfg.width,
                intermediate_size: mlp_width(vision_cfg.width, vision_cfg.mlp_ratio),
                num_hidden_layers: count,
                num_attention_heads: heads(vision_cfg.width),
                image_size: vision_cfg.image_size,
                patch_size: vision_cfg.patch_size.unwrap_or(16),
                hidden_act,
                layer_norm_eps: 1e-5,
                trunk: None,
            }),
            OpenClipLayers::ResNet(layers) => ClipVision::ResNet(ResNetConfig {
                layers,
                width: vision_cfg.width,
                heads: heads(32 * vision_cfg.width),
                image_size: vision_cfg.image_size,
            }),
        };
        let text = ClipTextConfig {
            vocab_size: text_cfg.vocab_size,
            hidden_size: text_cfg.width,
            intermediate_size: mlp_width(text_cfg.width, text_cfg.mlp_ratio),
            num_hidden_layers: text_cfg.layers,
            num_attention_heads: text_cfg.heads,
            max_position_embeddings: text_cfg.context_length,
            hidden_act,
            // OpenCLIP pools at the highest id.
            eos_token_id: 2,
            ..ClipTextConfig::clip()
        };
        Self { family: ClipFamily::Clip, vision, text, projection_dim: embed_dim }.checked()
    }

    /// The `config.json` of transformers for it.
    ///
    /// # Errors
    /// It has a ResNet, which transformers does not know.
    pub fn to_hugging_face(&self) -> Result<Value> {
        let ClipVision::Vit(vision) = &self.vision else {
            return Err(ModelError::Config(
                "a CLIP with a ResNet has no layout in transformers; keep its folder as it is".to_owned(),
            ));
        };
        let model_type = match self.family {
            ClipFamily::Clip => "clip",
            ClipFamily::Siglip => "siglip",
        };
        Ok(json!({
            "model_type": model_type,
            "projection_dim": self.projection_dim,
            "vision_config": vision,
            "text_config": self.text,
        }))
    }

    /// OpenCLIP's `open_clip_config.json` for it, with images stretched to its size; nothing for one without a ResNet, which transformers
    /// has a layout for.
    pub(crate) fn to_open_clip(&self) -> Option<Value> {
        let ClipVision::ResNet(vision) = &self.vision else { return None };
        let text = &self.text;
        Some(json!({
            "model_cfg": {
                "embed_dim": self.projection_dim,
                "quick_gelu": text.hidden_act == Activation::QuickGelu,
                "vision_cfg": {
                    "image_size": vision.image_size,
                    "layers": vision.layers,
                    "width": vision.width,
                    "head_width": 32 * vision.width / vision.heads,
                },
                "text_cfg": {
                    "context_length": text.max_position_embeddings,
                    "vocab_size": text.vocab_size,
                    "width": text.hidden_size,
                    "heads": text.num_attention_heads,
                    "layers": text.num_hidden_layers,
                    "mlp_ratio": text.intermediate_size as f64 / text.hidden_size as f64,
                },
            },
            "preprocess_cfg": { "resize_mode": "squash" },
        }))
    }

    /// Side of the square input image in pixels.
    #[must_use]
    pub fn image_size(&self) -> usize {
        match &self.vision {
            ClipVision::Vit(config) => config.image_size,
            ClipVision::ResNet(config) => config.image_size,
        }
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first value that cannot work.
    pub fn checked(self) -> Result<Self> {
        let text = &self.text;
        let mut positive = vec![
            ("the projection", self.projection_dim),
            ("the text's width", text.hidden_size),
            ("the text's MLP", text.intermediate_size),
            ("the text's context", text.max_position_embeddings),
            ("the vocabulary", text.vocab_size),
        ];
        let mut divides = vec![("heads of the text", text.num_attention_heads, text.hidden_size)];
        match &self.vision {
            ClipVision::Vit(v) => {
                positive.extend([
                    ("the vision's width", v.hidden_size),
                    ("the vision's MLP", v.intermediate_size),
                    ("the patch", v.patch_size),
                    ("the image", v.image_size),
                    ("the number of patches", v.image_size / v.patch_size.max(1)),
                ]);
                divides.push(("heads of the vision transformer", v.num_attention_heads, v.hidden_size));
            }
            ClipVision::ResNet(v) => {
                positive.extend([("the ResNet's width", v.width), ("the ResNet's image", v.image_size)]);
                divides.extend([
                    ("channels of the stem's first half", 2, v.width),
                    ("heads of the attention pool", v.heads, 32 * v.width),
                    ("pixels of a last cell", 32, v.image_size),
                ]);
            }
        }
        if let Some((what, value)) = positive.iter().find(|(_, value)| !(1..=MAX_SIZE).contains(value)) {
            return Err(ModelError::Config(format!("{what} has size {value}")));
        }
        let depth = match &self.vision {
            ClipVision::Vit(v) => v.num_hidden_layers.max(text.num_hidden_layers),
            ClipVision::ResNet(v) => v.layers.iter().copied().max().unwrap_or(0).max(text.num_hidden_layers),
        };
        if depth > MAX_LAYERS {
            return Err(ModelError::Config(format!("a transformer or ResNet has {depth} layers")));
        }
        if let Some((what, part, whole)) = divides.iter().find(|(_, part, whole)| *part == 0 || whole % part != 0) {
            return Err(ModelError::Config(format!("{part} {what} do not divide {whole}")));
        }
        let width = text.projection_size.unwrap_or(text.hidden_size);
        if self.family == ClipFamily::Siglip && width != self.projection_dim {
            return Err(ModelError::Config(format!(
                "SigLIP's text features have width {width}, its image features {}",
                self.projection_dim
            )));
        }
        Ok(self)
    }
}

/// `defaults` with what `given` says.
fn overlay<T: Serialize + DeserializeOwned>(defaults: &T, given: Option<Map<String, Value>>) -> serde_json::Result<T> {
    let mut value = serde_json::to_value(defaults)?;
    if let Value::Object(fields) = &mut value {
        fields.extend(given.unwrap_or_default());
    }
    serde_json::from_value(value)
}

fn mlp_width(width: usize, ratio: f64) -> usize {
    (width as f64 * ratio) as usize
}

#[derive(Deserialize)]
struct HuggingFaceFile {
    #[serde(default)]
    model_type: String,
    vision_config: Option<Map<String, Value>>,
    text_config: Option<Map<String, Value>>,
    vision_config_dict: Option<Map<String, Value>>,
    text_config_dict: Option<Map<String, Value>>,
    #[serde(default = "default_projection")]
    projection_dim: usize,
}

fn default_projection() -> usize {
    512
}

/// `model_cfg`. A key that is not listed changes what is computed, so it is refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenClipFile {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: OpenClipVision,
    text_cfg: OpenClipText,
}

/// `CLIPVisionCfg` of OpenCLIP's `model.py`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct OpenClipVision {
    layers: OpenClipLayers,
    width: usize,
    head_width: usize,
    mlp_ratio: f64,
    patch_size: Option<usize>,
    image_size: usize,
    /// Of training only.
    #[serde(rename = "patch_dropout")]
    _patch_dropout: f64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OpenClipLayers {
    Transformer(usize),
    ResNet([usize; 4]),
}

/// `CLIPTextCfg` of OpenCLIP's `model.py`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct OpenClipText {
    context_length: usize,
    vocab_size: usize,
    width: usize,
    heads: usize,
    layers: usize,
    mlp_ratio: f64,
    /// The tokenizer lies beside the config.
    #[serde(rename = "hf_tokenizer_name")]
    _hf_tokenizer_name: Option<String>,
    #[serde(rename = "tokenizer_kwargs")]
    _tokenizer_kwargs: Option<Value>,
}

impl Default for OpenClipVision {
    fn default() -> Self {
        Self {
            layers: OpenClipLayers::Transformer(12),
            width: 768,
            head_width: 64,
            mlp_ratio: 4.0,
            patch_size: Some(16),
            image_size: 224,
            _patch_dropout: 0.0,
        }
    }
}

impl Default for OpenClipText {
    fn default() -> Self {
        Self {
            context_length: 77,
            vocab_size: 49_408,
            width: 512,
            heads: 8,
            layers: 12,
            mlp_ratio: 4.0,
            _hf_tokenizer_name: None,
            _tokenizer_kwargs: None,
        }
    }
}
