//! COCO captions into rows.

use std::path::Path;

use arrow::array::{Array, AsArray};
use capfilt_crawler::{Annotate, AnnotateConfig, AnnotatedSource};

use crate::support::{png, run, texts};

fn set(folder: &Path, json: &str) -> AnnotateConfig {
    let annotations = folder.join("set.json");
    std::fs::write(&annotations, json).unwrap();
    AnnotateConfig {
        sources: vec![AnnotatedSource { name: "mine".to_owned(), annotations, images: None }],
        ..AnnotateConfig::default()
    }
}

#[tokio::test]
async fn a_row_for_each_image_with_all_its_captions() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("images")).unwrap();
    for (name, body) in [("a.png", png(1)), ("b.png", png(2)), ("bad.png", b"no image".to_vec())] {
        std::fs::write(folder.path().join("images").join(name), body).unwrap();
    }
    let json = r#"{"info": {}, "images": [
        {"id": "x1", "file_name": "images/b.png", "width": 64}, {"id": 7, "file_name": "images/a.png"},
        {"id": "bare", "file_name": "images/a.png"}, {"id": 8, "file_name": "images/bad.png"}, {"id": 9, "file_name": "images/none.png"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "A first\n one."}, {"id": 2, "image_id": "x1", "caption": "Of b"},
        {"id": 3, "image_id": 7, "caption": "A second."}, {"id": 4, "image_id": 8, "caption": "y"}, {"id": 5, "image_id": 9, "caption": "z"},
        {"id": 6, "image_id": "bare", "caption": "  "}]}"#;
    let (stage, tasks) = Annotate::new(&set(folder.path(), json)).unwrap();
    let (rows, facts) = run(&stage, &tasks[0], vec![]).await.unwrap();
    assert_eq!(
        texts(&rows, "url"),
        [
            "annotated:mine/images/b.png",
            "annotated:mine/images/a.png",
            "annotated:mine/images/bad.png",
            "annotated:mine/images/none.png"
        ]
    );
    assert_eq!(texts(&rows, "status"), ["ok", "ok", "not_image", "bad_url"]);
    assert_eq!(texts(&rows, "source"), vec!["mine"; 4]);
    let captions = rows.column_by_name("captions").unwrap().as_list::<i32>();
    let of = |i: usize| captions.value(i).as_string::<i32>().iter().map(|c| c.unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!((of(0), of(1)), (vec!["Of b".to_owned()], vec!["A first one.".to_owned(), "A second.".to_owned()]));
    assert!(rows.column_by_name("image").unwrap().is_valid(0) && rows.column_by_name("phash").unwrap().is_null(2));
    assert_eq!(facts["images_without_caption"], 1);
    assert_eq!(run(&stage, &tasks[0], vec![]).await.unwrap().0, rows);
}

#[tokio::test]
async fn what_is_no_such_set_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |json: &str| Annotate::new(&set(folder.path(), json)).err().unwrap().to_string();
    let error = refused(r#"{"images": [1]}"#);
    assert!(error.contains("not a COCO captions file"), "{error}");
    let error = refused(r#"{"images": [{"id": 1, "file_name": "gone.png"}], "annotations": []}"#);
    assert!(error.contains("none of its 1 images is in"), "{error}");

    let config = set(folder.path(), r#"{"images": [], "annotations": [] }"#);
    let (stage, tasks) = Annotate::new(&config).unwrap();
    std::fs::write(folder.path().join("set.json"), r#"{"images": [], "annotations": []}"#).unwrap();
    let error = run(&stage, &tasks[0], vec![]).await.unwrap_err();
    assert!(error.to_string().contains("needs the annotations with digest"), "a file that changed after planning: {error}");
    std::fs::remove_file(folder.path().join("set.json")).unwrap();
    let error = Annotate::new(&config).err().unwrap();
    assert!(error.to_string().starts_with("cannot read `"), "{error}");
}
