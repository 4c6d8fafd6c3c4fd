//! Files with definitions: whatever stands in one, what is accepted selects within its scope and over its window.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::definitions::{Definition, parse};
use sysdig_metrics_adapter::route::{Resource, is_metric_id};

/// A template has no other selectors than `name{$matchers…}[$window]`, each of them whole.
fn check_template(template: &str) {
    let (mut outside, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('{') {
        assert!(before.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':'), "{template:?}");
        let (inside, after) = after.split_once("}[$window]").unwrap_or_else(|| panic!("{template:?}"));
        assert!(inside.starts_with("$matchers"), "{template:?}");
        // Braces and brackets stand in strings only.
        let plain: String = inside.split('"').step_by(2).collect();
        assert!(inside.matches('"').count() % 2 == 0 && !plain.contains(['{', '}', '[', '(']), "{template:?}");
        assert!(!inside.contains(['\\', '\n']) && inside.matches('$').count() == 1, "{template:?}");
        outside.extend([before, "[]"]);
        rest = after;
    }
    outside += rest;
    assert!(outside.len() > rest.len() && outside.contains("$by)"), "{template:?}");
    assert_eq!(outside.matches('[').count(), outside.matches("[]").count(), "{template:?}");
    assert!(!outside.contains(['{', '}', '@', '#', '\n', '"', '\'', '`']), "{template:?}");
    // A word that begins neither a call nor a group, and is none of a list, would be a metric's name.
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let outside = outside.replace("$by", "");
    let mut rest = outside.as_str();
    while let Some(start) = rest.find(|c: char| word(c) && !c.is_ascii_digit()) {
        let (before, from) = rest.split_at(start);
        let (name, after) = from.split_at(from.find(|c| !word(c)).unwrap_or(from.len()));
        let number = before.ends_with(|c: char| c.is_ascii_digit());
        let grouped = ["by", "on"].iter().any(|list| after.trim_start().starts_with(list));
        let listed = after.split_once(')').is_some_and(|(list, _)| list.chars().all(|c| word(c) || ", ".contains(c)));
        let selected = after.starts_with('[');
        let call = after.trim_start().starts_with('(');
        assert!(number || grouped || listed || selected || call, "{name} in {template:?}");
        rest = after;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = parse(bytes) else { return };
    for Definition { name, metric, selector, scope, absence: (hold, zero), max_age, .. } in file.metrics {
        assert!(is_metric_id(&name), "{name:?}");
        if metric.contains('{') {
            check_template(&metric)
        } else {
            assert!(is_metric_id(&metric), "{metric:?}")
        }
        assert!(scope.is_none_or(|scope| [Resource::NAMESPACES, Resource::CLUSTER].contains(scope)));
        assert!(max_age == 0 || (10..=86_400).contains(&max_age));
        assert!(hold == 0 || (!zero && (10..=86_400).contains(&hold)));
        for label in &selector {
            for text in label.values.iter().chain([&label.key]) {
                assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)), "{text:?}");
            }
        }
    }
    for Resource { kind, plural, api_version, label, .. } in file.resources {
        for text in [kind, plural, api_version, label] {
            let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:".contains(&b));
            assert!(plain && !text.is_empty() && !text.contains(".."), "{text:?}");
        }
    }
});
