//! Training by programs and services of others.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::http::{HeaderMap, Method, Response, StatusCode};
use serde_json::Value;

use crate::world::World;

#[test]
#[ignore = "needs PyTorch: TRANSFORMERS_PYTHON names a Python of scripts/requirements-goldens.txt"]
fn an_external_trainer_in_pytorch_trains_on_the_exported_shards() {
    let world = World::new(20);
    let python = std::env::var("TRANSFORMERS_PYTHON").unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/train_with_torch.py");
    let command = format!("train.captioner={{ command = ['{python}', '{script}'], steps = 12, batch = 8, rate = 1e-3 }}");
    let run = world.run(&[&command, "run.rounds=2", "build.min_itm=0.0", "retrain.confidence=0.0", "retrain.min_gain=-10"]);
    assert_eq!(run["tasks_given_up"], 0);
    let results = run["results"].as_array().unwrap();
    let promoted = |round: usize| results[round]["promoted"].as_array().unwrap().iter().any(|role| role == "captioner");
    assert!(promoted(0), "{}", results[0]);
    // What it has trained is another model, and writes the captions of the next round.
    let status = world.json(&["status", "run.toml", "--json", "--set", "run.rounds=2"]);
    assert_ne!(status["rounds"][0]["captioner"], status["rounds"][1]["captioner"]);
    assert_ne!(results[0]["metrics"]["captioner/rouge_l"], results[0]["challenger_metrics"]["captioner/rouge_l"]);
}

/// Serves an app on loopback and tells its address.
fn serve(runtime: &tokio::runtime::Runtime, app: axum::Router) -> String {
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    runtime.spawn(async move { axum::serve(listener, app).await });
    address
}

/// All that a training in these tests does: the files of one folder into another.
fn copy(from: &str, to: &str) {
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), Path::new(to).join(file.file_name())).unwrap();
    }
}

/// A service that trains by copying the champion, and is busy, then at work, before it is done. What it is asked is noted.
fn training_service(runtime: &tokio::runtime::Runtime) -> (String, Arc<Mutex<Vec<Value>>>) {
    let asked = Arc::new(Mutex::new(Vec::<Value>::new()));
    let (noted, polls) = (Arc::clone(&asked), Arc::new(AtomicU64::new(0)));
    let app = axum::Router::new().fallback(move |method: Method, uri: axum::http::Uri, body: String| {
        let answer = |code: StatusCode, body: &str| {
            let answer = Response::builder().status(code).header("location", "/job").header("retry-after", "0");
            answer.body(Body::from(body.to_owned())).unwrap()
        };
        // As HTTP has it, only what it named is there.
        if method == Method::GET && uri.path() != "/job" {
            let wrong = answer(StatusCode::METHOD_NOT_ALLOWED, "");
            return std::future::ready(wrong);
        }
        let answer = match (method, polls.fetch_add(1, Ordering::Relaxed)) {
            (_, 0) => answer(StatusCode::SERVICE_UNAVAILABLE, "busy"),
            (Method::POST, _) => {
                noted.lock().unwrap().push(serde_json::from_str(&body).unwrap());
                answer(StatusCode::ACCEPTED, "")
            }
            (_, 2) => answer(StatusCode::ACCEPTED, ""),
            _ => {
                let job = noted.lock().unwrap()[0].clone();
                copy(job["champion"].as_str().unwrap(), job["output"].as_str().unwrap());
                answer(StatusCode::OK, "{}")
            }
        };
        std::future::ready(answer)
    });
    (serve(runtime, app), asked)
}

#[test]
fn a_service_is_asked_to_train_and_waited_for() {
    let world = World::new(20);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (address, asked) = training_service(&runtime);
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let command =
        |url: &str| format!("train.filter={{ command = ['python3', '{root}/configs/trainers/webhook.py', '{url}'], steps = 7 }}");
    let run = world.run(&[&command(&address), "run.rounds=1"]);
    assert_eq!(run["tasks_given_up"], 0);
    assert!(run["results"][0]["challenger_metrics"]["filter/auroc"].is_f64());
    let asked = asked.lock().unwrap();
    assert_eq!((asked.len(), &asked[0]["role"], &asked[0]["params"]["steps"]), (1, &Value::from("filter"), &Value::from(7)));
    assert!(asked[0]["export"].as_str().is_some_and(|folder| folder.starts_with('/')), "{asked:?}");

    let lost = ["run", "run.toml", "--set", "run.rounds=1", "--set", "worker.runtime.max_attempts=1", "--set"];
    let refused = world.command(&lost).arg(command("http://127.0.0.1:9/jobs")).env("WEBHOOK_PATIENCE", "0").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("http://127.0.0.1:9/jobs cannot be reached"), "{said}");
}

/// The Jobs of a Kubernetes API that has one already, which has failed; those that are made copy the champion. What is asked is noted.
fn kubernetes_api(runtime: &tokio::runtime::Runtime) -> (String, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::<String>::new()));
    let (noted, there) = (Arc::clone(&asked), Arc::new(Mutex::new(Some(None::<String>))));
    let app = axum::Router::new().fallback(move |method: Method, uri: axum::http::Uri, headers: HeaderMap, body: String| {
        assert_eq!(headers["authorization"], "Bearer secret");
        noted.lock().unwrap().push(format!("{method} {}", uri.path().trim_end_matches(|c: char| c.is_ascii_hexdigit())));
        let mut there = there.lock().unwrap();
        let value = |name: &str| -> String {
            let line = body.lines().find(|line| line.contains(&format!("name: {name}, value: "))).unwrap();
            serde_json::from_str(line.split("value: ").nth(1).unwrap().trim_end_matches(" }")).unwrap()
        };
        let job = |condition: &str| {
            format!(r#"{{"metadata": {{}}, "status": {{"conditions": [{{"type": "{condition}", "status": "True"}}]}}}}"#)
        };
        let (code, said) = match (method, &*there) {
            (Method::POST, Some(_)) => (StatusCode::CONFLICT, "{}".to_owned()),
            (Method::POST, None) => {
                assert_eq!(headers["content-type"], "application/yaml");
                assert_eq!(serde_json::from_str::<Value>(&value("CAPFILT_PARAMS")).unwrap()["steps"], 7);
                copy(&value("CAPFILT_CHAMPION"), &value("CAPFILT_OUTPUT"));
                *there = Some(Some(body));
                (StatusCode::CREATED, "{}".to_owned())
            }
            (Method::DELETE, _) => {
                *there = None;
                (StatusCode::OK, "{}".to_owned())
            }
            (_, None) => (StatusCode::NOT_FOUND, "{}".to_owned()),
            (_, Some(made)) => (StatusCode::OK, job(if made.is_some() { "Complete" } else { "Failed" })),
        };
        async move { (code, said) }
    });
    (serve(runtime, app), asked)
}

#[test]
fn a_kubernetes_job_trains_and_a_failed_one_is_made_anew() {
    let world = World::new(20);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (address, asked) = kubernetes_api(&runtime);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/trainers");
    let command =
        format!("train.filter={{ command = ['python3', '{folder}/kubernetes_job.py', '{folder}/job.yaml'], steps = 7 }}");
    let mut run = world.command(&["run", "run.toml", "--json", "--set", "run.rounds=1", "--set", &command]);
    let run = run
        .env("KUBERNETES_API", &address)
        .env("KUBERNETES_TOKEN", "secret")
        .env("KUBERNETES_NAMESPACE", "training")
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let run: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(run["results"][0]["challenger_metrics"]["filter/auroc"].is_f64());
    let jobs = "/apis/batch/v1/namespaces/training/jobs";
    let one = format!("{jobs}/capfilt-train-");
    let expected = [("POST", jobs), ("GET", &one), ("DELETE", &one), ("GET", &one), ("POST", jobs), ("GET", &one)];
    assert_eq!(*asked.lock().unwrap(), expected.map(|(method, path)| format!("{method} {path}")));
}

#[test]
fn an_external_trainer_is_given_the_export_and_leaves_a_model() {
    let world = World::new(20);
    let script = "test -f $CAPFILT_EXPORT/manifest.json && cp $CAPFILT_CHAMPION/* $CAPFILT_OUTPUT && echo trained > $CAPFILT_OUTPUT/log.txt";
    let command = format!("train.filter={{ command = ['sh', '-c', '{script}'] }}");
    let run = world.run(&[&command, "run.rounds=1"]);
    assert_eq!(run["tasks_given_up"], 0);
    assert!(run["results"][0]["challenger_metrics"]["filter/auroc"].is_f64());
    // Another run that shares the build has no version of its own yet; it must not depend on who built.
    let other = world.run(&[&command, "run.rounds=1", "run.name=other"]);
    assert_eq!(other["tasks_given_up"], 0);
    // One that fails leaves the model in service where it is.
    let failing = "train.filter={ command = ['sh', '-c', 'echo out of paper >&2; exit 3'] }";
    let (code, said) =
        world.refuse(&["run", "run.toml", "--set", "run.rounds=1", "--set", failing, "--set", "worker.runtime.max_attempts=1"]);
    assert_eq!(code, 4);
    assert!(said.contains("out of paper"), "{said}");
}
