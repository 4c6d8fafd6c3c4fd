//! Answers of the Kubernetes API, over TLS: they are understood or refused in one readable line.
#![no_main]

mod readable;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use readable::{TOKEN, readable};
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use support::http::{HttpServer, Reply, lock};
use support::pki::rustls_server_config;
use support::{Ca, TempDir};
use sysdig_metrics_adapter::config::Config;
use sysdig_metrics_adapter::kube::Kube;
use sysdig_metrics_adapter::requestheader::RequestHeader;
use sysdig_metrics_adapter::route::Resource;

type Answer = Arc<Mutex<(u16, Vec<u8>)>>;

struct Stage {
    answer: Answer,
    kube: Kube,
    _server: HttpServer,
    _dir: TempDir,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let answer = Answer::default();
    let given = Arc::clone(&answer);
    let (ca, dir) = (Ca::new("kubernetes"), TempDir::new());
    let server = HttpServer::start(Some(rustls_server_config(&ca.issue_server(&["127.0.0.1"]))), move |_| {
        let (status, body) = lock(&given).clone();
        Reply::typed(status, "application/json", body)
    });
    dir.write("token", TOKEN);
    dir.write("ca.crt", ca.pem());
    let (port, folder) = (server.port().to_string(), dir.path().display().to_string());
    let config = Config::read(|name| match name {
        "KUBERNETES_SERVICE_HOST" => Some(Ok("127.0.0.1".to_owned())),
        "KUBERNETES_SERVICE_PORT" => Some(Ok(port.clone())),
        "SERVICE_ACCOUNT_DIR" => Some(Ok(folder.clone())),
        // Nothing is remembered from one answer to the next.
        "REFRESH_INTERVAL" => Some(Ok("0s".to_owned())),
        _ => None,
    });
    Stage { answer, kube: Kube::new(&config.expect("the settings are right")), _server: server, _dir: dir }
});

fuzz_target!(|bytes: &[u8]| {
    let Some((first, body)) = bytes.split_first() else { return };
    let status = [200, 200, 200, 200, 200, 201, 401, 403, 404, 409, 429, 500, 503, 302, 204, 206][usize::from(first % 16)];
    *lock(&STAGE.answer) = (status, body.to_vec());
    let understood = matches!(status, 200 | 201);
    let wanted = ("default".to_owned(), "kuard".to_owned());
    let sent = || serde_json::from_slice::<Value>(body).expect("only JSON is understood");
    for resource in [Resource::SERVICES, Resource::PODS, Resource::DEPLOYMENTS, Resource::NODES] {
        let objects = STAGE.kube.objects(&resource, "default", "app=kuard", Some(&wanted));
        readable(&objects);
        assert!(objects.is_err() || understood);
        // An answer that goes on for ever has been refused, so this one has no more objects than are in it.
        if let Ok(objects) = objects {
            assert!(objects.len() <= sent()["items"].as_array().map_or(0, Vec::len));
        }
    }
    for resource in [Resource::SERVICES, Resource::DEPLOYMENTS, Resource::JOBS] {
        let ready = STAGE.kube.ready(&resource, "default", &wanted);
        readable(&ready);
        assert!(ready.is_err() || understood);
        if let Ok((count, pods)) = ready {
            assert!(count >= pods.len() as u64);
            assert!(count == 0 || sent()["items"].as_array().is_some_and(|items| !items.is_empty()));
        }
    }
    readable(&STAGE.kube.request_header());
    if let Ok(Ok(config)) = serde_json::from_slice::<Value>(body).as_ref().map(RequestHeader::parse) {
        assert!(!config.headers[0].is_empty(), "there is a header for names");
        assert!(config.judge(&[], 1_800_000_000).is_err());
        assert!(config.judge(&[CertificateDer::from(body)], 1_800_000_000).is_err(), "JSON is no certificate");
    }
});
