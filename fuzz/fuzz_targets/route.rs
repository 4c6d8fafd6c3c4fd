//! Paths and queries: what is understood is within its bounds, and a refusal is one readable line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::route::{APIS, EXTERNAL, Route, is_metric_id, percent_decode, route};
use sysdig_metrics_adapter::selector::settle;

fuzz_target!(|text: &str| {
    let (method, target) = text.split_once(' ').unwrap_or(("GET", text));
    for external in [false, true] {
        match route(method, target, external, &[]) {
            Ok(Route::Read(read)) => {
                assert_eq!(method, "GET");
                assert!(APIS.contains(&read.api) && (external || read.api.0 != EXTERNAL));
                assert!(is_metric_id(&read.metric), "{:?}", read.metric);
                for name in [&read.namespace, &read.name, &read.select.namespace, &read.select.name, &read.metric] {
                    assert!(name.len() <= 253 + 16, "{name:?}");
                    assert!(name == "*" || !name.contains(['/', '\'', '"', '\\', '*', '?', '#', '%']), "{name:?}");
                    assert!(!name.chars().any(|c| c.is_control() || c.is_whitespace()), "{name:?}");
                    assert!(*name != "." && *name != "..", "{name:?}");
                }
                assert!(read.select.labels.is_empty() || read.name == "*");
                assert_eq!(read.access[0] == "list", read.api.0 == EXTERNAL || read.access[3].is_empty());
                let (labels, tuning) = settle(&read.selector);
                assert!((20..=600).contains(&tuning.window) && tuning.window % 10 == 0);
                for label in &labels {
                    for text in label.values.iter().chain([&label.key]) {
                        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)), "{text:?}");
                    }
                    assert!(!label.key.starts_with("sysdig/"));
                }
            }
            Ok(Route::Resources(api)) => assert!(APIS.contains(&api) && (external || api.0 != EXTERNAL)),
            Ok(Route::Document(text)) => assert!(external || !text.contains(EXTERNAL)),
            Ok(_) => assert_eq!(method, "GET"),
            Err(error) => {
                assert!(!error.message.chars().any(char::is_control), "{:?}", error.message);
                assert!(error.message.len() < 2000, "{}", error.message.len());
            }
        }
    }
    let encoded: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
    assert_eq!(percent_decode(&encoded).as_deref(), Some(text));
});
