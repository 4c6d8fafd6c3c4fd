//! Paths and queries: what is understood is within its bounds, and a refusal is one readable line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::route::{Route, VERSIONS, is_metric_id, percent_decode, route};

fuzz_target!(|text: &str| {
    let (method, target) = text.split_once(' ').unwrap_or(("GET", text));
    match route(method, target) {
        Ok(Route::Read(read)) => {
            assert_eq!(method, "GET");
            assert!(VERSIONS.contains(&read.version));
            assert!(is_metric_id(&read.metric), "{:?}", read.metric);
            for name in [&read.namespace, &read.name, &read.object, &read.metric] {
                assert!(name.len() <= 253 + 16, "{name:?}");
                assert!(name == "*" || !name.contains(['/', '\'', '"', '\\', '*', '?', '#', '%']), "{name:?}");
                assert!(!name.chars().any(|c| c.is_control() || c.is_whitespace()), "{name:?}");
                assert!(*name != "." && *name != "..", "{name:?}");
            }
            assert!(read.objects.is_empty() || read.name == "*");
            assert!((20..=600).contains(&read.tuning.window) && read.tuning.window % 10 == 0);
            for label in &read.labels {
                for text in label.values.iter().chain([&label.key]) {
                    assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)), "{text:?}");
                }
                assert!(!label.key.starts_with("sysdig/"));
            }
        }
        Ok(_) => assert!(method == "GET" || method == "HEAD", "{method:?}"),
        Err(error) => {
            assert!(!error.message.chars().any(char::is_control), "{:?}", error.message);
            assert!(error.message.len() < 2000, "{}", error.message.len());
        }
    }
    let encoded: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
    assert_eq!(percent_decode(&encoded, false).as_deref(), Some(text));
});
