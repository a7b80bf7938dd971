//! Cleaning, tokenizing, training a vocabulary.

use std::path::Path;

use capfilt_models::config::MedConfig;
use capfilt_models::special;
use capfilt_models::tokenizer::{FirstToken, TextBatch, TextTokenizer, clean_caption, train_wordpiece};

use crate::fixture::{CAPTIONS, config, tokenizer, tokenizer_json};

#[test]
fn captions_are_cleaned_as_in_training() {
    for (raw, clean) in [
        ("A Dog.", "a dog"),
        ("Wait... what?!", "wait what?"),
        ("\"quoted\" (in brackets) *bold* #tag 10:30 a;b ~c", "quoted in brackets bold tag 10 30 a b c"),
        ("keep , - ' & / $ % @ these", "keep , - ' & / $ % @ these"),
        ("  many \t kinds\n of   space \r\n", "many kinds of space"),
        ("it's 3.5 m", "it's 3 5 m"),
        ("ÉCOLE Ünïcode", "école ünïcode"),
        ("...", ""),
        ("", ""),
    ] {
        assert_eq!(clean_caption(raw, 50), clean, "{raw:?}");
    }
    assert_eq!(clean_caption("one two three four", 3), "one two three");
}

#[test]
fn a_vocabulary_depends_on_the_captions_alone() {
    let first = tokenizer_json();
    let mut turned = CAPTIONS;
    turned.reverse();
    for _ in 0..3 {
        assert_eq!(train_wordpiece(&turned, 200).unwrap(), first);
    }
    assert_ne!(train_wordpiece(&CAPTIONS[1..], 200).unwrap(), first);
    let error = train_wordpiece(&CAPTIONS, 20).unwrap_err();
    assert!(error.to_string().contains("vocabulary of 20 tokens"), "{error}");
}

#[test]
fn special_tokens_come_first_and_agree_with_the_tiny_config() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.sep_id(), special::SEP_ID);
    assert_eq!(tokenizer.pad_id(), special::PAD_ID);
    assert_eq!(tokenizer.first_id(FirstToken::Dec), special::DEC_ID);
    assert_eq!(tokenizer.first_id(FirstToken::Enc), special::ENC_ID);
    for (token, id) in special::TOKENS.iter().zip(0..) {
        let content = format!("\"id\": {id},\n      \"content\": \"{token}\"");
        assert!(tokenizer.json().contains(&content), "{content}");
    }
}

#[test]
fn texts_come_back_from_their_ids() {
    let tokenizer = tokenizer();
    for text in CAPTIONS {
        let ids = tokenizer.encode(text, FirstToken::Cls, 60).unwrap();
        assert_eq!((ids[0], ids[ids.len() - 1]), (tokenizer.first_id(FirstToken::Cls), special::SEP_ID));
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    // Upper case and accents are the normaliser's; a character never seen is unknown.
    let plain = tokenizer.encode("a dog", FirstToken::Cls, 60).unwrap();
    assert_eq!(tokenizer.encode("Á DOG", FirstToken::Cls, 60).unwrap(), plain);
    assert!(tokenizer.encode("犬", FirstToken::Cls, 60).unwrap().contains(&1));
}

#[test]
fn long_texts_are_cut_before_their_end() {
    let tokenizer = tokenizer();
    let whole = tokenizer.encode(CAPTIONS[0], FirstToken::Enc, 60).unwrap();
    let cut = tokenizer.encode(CAPTIONS[0], FirstToken::Enc, 6).unwrap();
    assert_eq!(cut[..5], whole[..5]);
    assert_eq!((cut.len(), cut[5]), (6, special::SEP_ID));
    assert!(tokenizer.encode("a", FirstToken::Enc, 1).is_err());
}

#[test]
fn batches_are_padded_on_the_right() {
    let tokenizer = tokenizer();
    let rows = ["a dog", "a"].map(|text| tokenizer.encode(text, FirstToken::Cls, 30).unwrap());
    let batch = TextBatch::pad(&rows, 0, tokenizer.pad_id());
    let long = tokenizer.encode("a dog", FirstToken::Cls, 30).unwrap().len();
    assert_eq!(batch.width, long);
    assert_eq!(batch.mask[..long], vec![1; long]);
    assert_eq!(batch.mask[long..long + 3], [1, 1, 1]);
    assert!(batch.mask[long + 3..].iter().all(|x| *x == 0));
    assert!(batch.ids[long + 3..].iter().all(|id| *id == special::PAD_ID));
    let (ids, mask) = TextBatch::pad(&[vec![1u32, 2]], 5, 9).tensors(&candle_core::Device::Cpu).unwrap();
    assert_eq!(ids.to_vec2::<u32>().unwrap(), [[1, 2, 9, 9, 9]]);
    assert_eq!(mask.to_vec2::<u32>().unwrap(), [[1, 1, 0, 0, 0]]);
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let path = Path::new("tokenizer.json");
    let open =
        |json: String, config: &MedConfig| TextTokenizer::from_json(json, &config.text_config, path).unwrap_err().to_string();
    let mut other = config();
    other.text_config.sep_token_id = 4;
    assert!(open(tokenizer_json(), &other).contains("[SEP]"));
    let small = MedConfig::tiny(50);
    assert!(open(tokenizer_json(), &small).contains("the model only 50"));
    assert!(open("{}".to_owned(), &config()).contains("does not parse"));
}
