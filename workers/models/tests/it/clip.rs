//! CLIP's scorer, its configs, and the translation of OpenCLIP's names; questions and their answers.

use std::collections::BTreeSet;
use std::path::Path;

use capfilt_models::clip::openclip::{Part, source};
use capfilt_models::clip::{Clip, ClipConfig, ClipFamily, ClipScorer, ClipTokenizer, ClipVision, clip_score};
use capfilt_models::ops::Activation;
use capfilt_models::preprocess::Pixels;
use capfilt_models::tokenizer::{FirstToken, clean_question};
use capfilt_models::vqa::{Answerer, Vqa};
use serde_json::{Value, json};

use crate::families::rule;
use crate::fixture::{CAPTIONS, config, images, tokenizer};

/// A vocabulary of single letters.
fn clip_tokenizer() -> ClipTokenizer {
    let letters = ('a'..='z').flat_map(|c| [c.to_string(), format!("{c}</w>")]);
    let words = letters.chain(["<|startoftext|>".to_owned(), "<|endoftext|>".to_owned()]);
    let vocab = Value::Object(words.zip(0..).map(|(word, id)| (word, json!(id))).collect()).to_string();
    let json = ClipTokenizer::json_from_merges(&vocab, "#version: 0.2\n", Path::new("vocab.json")).unwrap();
    ClipTokenizer::from_json(&json, None, ClipFamily::Clip, Path::new("tokenizer.json")).unwrap()
}

fn small() -> Value {
    json!({
        "model_type": "clip", "projection_dim": 24,
        "vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
                          "image_size": 32, "patch_size": 8},
        "text_config": {"vocab_size": 54, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "max_position_embeddings": 40, "eos_token_id": 53},
    })
}

fn read(config: &Value) -> capfilt_models::Result<ClipConfig> {
    ClipConfig::from_hugging_face(&config.to_string(), Path::new("config.json"))
}

fn scorer() -> ClipScorer {
    ClipScorer::new(Clip::load(&read(&small()).unwrap(), rule()).unwrap(), clip_tokenizer()).unwrap()
}

#[test]
fn a_cosine_does_not_depend_on_its_batch() {
    let scorer = scorer();
    let texts = vec![vec![CAPTIONS[0], "dog", CAPTIONS[3]], vec![], vec![CAPTIONS[1]], vec!["", CAPTIONS[2], "a cat"]];
    let images = images(4);
    let batch = scorer.score(&images, &texts).unwrap();
    assert_eq!(batch.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 1, 3]);
    let mut distinct = BTreeSet::new();
    for (i, list) in texts.iter().enumerate() {
        for (j, text) in list.iter().enumerate() {
            let alone = scorer.score(&images[i..=i], &[vec![*text]]).unwrap();
            assert_eq!(alone, [vec![batch[i][j]]], "text {j} of image {i}");
            assert!((-1.0..=1.0).contains(&batch[i][j]));
            distinct.insert(batch[i][j].to_bits());
        }
    }
    assert_eq!(distinct.len(), 7, "every pair has a cosine of its own");
    assert!(scorer.score(&images[..1], &texts).is_err());
}

#[test]
fn long_texts_are_cut_before_their_end() {
    let scorer = scorer();
    let long = "abcdefghij".repeat(8);
    let longer = format!("{long} and what no position is left for");
    let scores = scorer.score(&images(1), &[vec![long.as_str(), longer.as_str(), &long[1..]]]).unwrap();
    assert_eq!(scores[0][0], scores[0][1]);
    assert_ne!(scores[0][0], scores[0][2]);
    let ids = clip_tokenizer().encode(&long, 40).unwrap();
    assert_eq!((ids.len(), ids[0], ids[39]), (40, 52, 53));
}

#[test]
fn clip_score_is_never_negative() {
    assert_eq!([clip_score(0.4), clip_score(-0.1), clip_score(0.0)], [1.0, 0.0, 0.0]);
}

#[test]
fn defaults_are_those_of_transformers() {
    let clip = read(&json!({"model_type": "clip"})).unwrap();
    let ClipVision::Vit(vision) = &clip.vision else { panic!("a vision transformer") };
    assert_eq!((vision.patch_size, vision.image_size, vision.hidden_act), (32, 224, Activation::QuickGelu));
    assert_eq!((clip.projection_dim, clip.text.hidden_size, clip.text.eos_token_id), (512, 512, 49_407));
    let siglip = read(&json!({"model_type": "siglip", "vision_config": {"image_size": 384}})).unwrap();
    assert_eq!((siglip.image_size(), siglip.text.max_position_embeddings, siglip.projection_dim), (384, 64, 768));
    assert_eq!(siglip.text.hidden_act, Activation::TanhGelu);
    // OpenAI's own files have both; the older key counts.
    let both = json!({"model_type": "clip", "text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 128}});
    assert_eq!(read(&both).unwrap().text.hidden_size, 128);
    assert_eq!(read(&json!({"model_type": "clip", "text_config_dict": null})).unwrap(), clip);
}

#[test]
fn open_clip_configs_are_read_and_strange_ones_refused() {
    let open = |config: &Value| ClipConfig::from_open_clip(&config.to_string(), Path::new("open_clip_config.json"));
    let rn50 = json!({"embed_dim": 1024, "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": null},
                      "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}});
    let ClipVision::ResNet(resnet) = open(&rn50).unwrap().vision else { panic!("a ResNet") };
    assert_eq!((resnet.layers, resnet.heads), ([3, 4, 6, 3], 32));
    let h14 = json!({"model_cfg": {"embed_dim": 1024, "quick_gelu": false,
                     "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
                     "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}},
                     "preprocess_cfg": {"mean": [0.0, 0.0, 0.0]}});
    let config = open(&h14).unwrap();
    let ClipVision::Vit(vision) = &config.vision else { panic!("a vision transformer") };
    assert_eq!((vision.num_attention_heads, vision.intermediate_size, vision.hidden_act), (16, 5120, Activation::Gelu));
    for (pointer, key, value) in [
        ("/vision_cfg", "timm_model_name", json!("vit_base_patch16_siglip_224")),
        ("/text_cfg", "hf_model_name", json!("roberta-base")),
        ("/vision_cfg", "qk_norm", json!(true)),
        ("", "multimodal_cfg", json!({})),
    ] {
        let mut strange = rn50.clone();
        strange.pointer_mut(pointer).unwrap()[key] = value;
        let error = open(&strange).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(key), "{cause}");
    }
}

#[test]
fn impossible_configs_are_refused() {
    for (pointer, value, message) in [
        ("/text_config/num_attention_heads", json!(5), "5 heads of the text"),
        ("/vision_config/num_attention_heads", json!(0), "0 heads of the vision"),
        ("/projection_dim", json!(0), "projection"),
        ("/vision_config/patch_size", json!(64), "number of patches"),
        ("/model_type", json!("blip"), "\"blip\""),
    ] {
        let mut config = small();
        *config.pointer_mut(pointer).unwrap() = value;
        let error = read(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let error = read(&json!({"model_type": "clip", "vision_config": {"hidden_act": "swish"}})).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("swish"));
}

#[test]
fn every_name_of_a_clip_has_a_source_in_open_clips_layout() {
    for (name, custom_text, expected, part) in [
        (
            "vision_model.encoder.layers.11.self_attn.v_proj.bias",
            false,
            "visual.transformer.resblocks.11.attn.in_proj_bias",
            Part::Third(2),
        ),
        ("text_model.encoder.layers.0.mlp.fc1.weight", false, "transformer.resblocks.0.mlp.c_fc.weight", Part::Whole),
        ("text_model.encoder.layers.0.layer_norm2.bias", true, "text.transformer.resblocks.0.ln_2.bias", Part::Whole),
        ("text_projection.weight", true, "text.text_projection", Part::Transposed),
        ("visual_projection.weight", true, "visual.proj", Part::Transposed),
        ("logit_scale", true, "logit_scale", Part::Whole),
        ("visual.layer1.0.conv1.weight", false, "visual.layer1.0.conv1.weight", Part::Whole),
    ] {
        let found = source(name, custom_text);
        assert_eq!((found.name.as_str(), found.part), (expected, part), "{name}");
    }
}

#[test]
fn an_answer_does_not_depend_on_other_questions() {
    let answerer = Answerer::new(Vqa::load(&config(), rule()).unwrap(), tokenizer(), FirstToken::Enc).unwrap();
    let questions = vec![vec!["how many dogs?", "what is on the beach?"], vec![], vec!["a red bus?"]];
    let images = images(3);
    let answers = answerer.answer(&images, &questions).unwrap();
    assert_eq!(answers.iter().map(Vec::len).collect::<Vec<_>>(), [2, 0, 1]);
    for (i, list) in questions.iter().enumerate() {
        for (j, question) in list.iter().enumerate() {
            assert_eq!(answerer.answer(&images[i..=i], &[vec![*question]]).unwrap(), [vec![answers[i][j].clone()]]);
        }
    }
    assert!(answerer.answer(&images, &questions[..1]).is_err());
    let small = Pixels::new(16, vec![0.0; 3 * 16 * 16]).unwrap();
    assert!(answerer.answer(&[small], &[vec!["a dog?"]]).is_err());
}

#[test]
fn questions_are_cleaned_as_in_training() {
    assert_eq!(clean_question("How many (red) DOGS; are there?!", 50), "how many red dogs are there?");
    assert_eq!(clean_question("one two three", 2), "one two");
}
