//! What a client accepts, and what it has already: `Accept` and `If-None-Match`.
//!
//! Pure. Source: <https://www.rfc-editor.org/rfc/rfc9110#name-content-negotiation>.

use std::hash::{DefaultHasher, Hasher};

/// Media ranges of an `Accept` header that are looked at; clients send three.
const MAX_RANGES: usize = 64;

/// The form in which a client wants `/apis`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Groups and versions in one document of version `v2` or `v2beta1` of `apidiscovery.k8s.io`.
    Aggregated(&'static str),
    /// Only forms that are not served; the answer is 406.
    NotAcceptable,
    /// Plain JSON.
    Plain,
}

/// The entity tag of a body.
///
/// It need not withstand attack, as all bodies are our own, and 64 bits tell their few versions apart. The hasher's
/// keys are fixed, so replicas of one build agree; another build may hash differently, which costs one more download.
pub fn etag(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(body);
    format!("\"{:016X}\"", hasher.finish())
}

/// Whether `If-None-Match` names this tag, so that 304 is the answer.
/// Source: <https://www.rfc-editor.org/rfc/rfc9110#name-if-none-match>.
pub fn not_modified(if_none_match: Option<&str>, etag: &str) -> bool {
    let mut tags = if_none_match.unwrap_or_default().split(',').map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

/// Whether `Accept` allows JSON. Without that header anything is allowed.
pub fn accepts_json(accept: Option<&str>) -> bool {
    forms(accept).any(|(quality, form)| quality > 0 && form == Form::Plain)
}

/// The form of `/apis` that `Accept` prefers: by weight, then the one named first.
pub fn negotiate_apis(accept: Option<&str>) -> Form {
    let better = |best: (u16, Form), found: (u16, Form)| if found.0 > best.0 { found } else { best };
    forms(accept).fold((0, Form::NotAcceptable), better).1
}

/// What the media ranges ask for, each with its weight in thousandths.
fn forms(accept: Option<&str>) -> impl Iterator<Item = (u16, Form)> {
    let accept = accept.filter(|text| text.contains(|c: char| c != ',' && !c.is_whitespace())).unwrap_or("*/*");
    let ranges = accept.split(',').map(str::trim).filter(|range| !range.is_empty());
    ranges.take(MAX_RANGES).filter_map(parse_range)
}

/// A range with any of `g`, `v` and `as` asks for another object in place of the plain one (kubectl asks for tables).
/// Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources>.
fn parse_range(text: &str) -> Option<(u16, Form)> {
    let mut parts = text.split(';').map(str::trim);
    let essence = parts.next()?.to_ascii_lowercase();
    let (mut quality, mut special) = (1000, [None; 3]);
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let value = value.trim().trim_matches('"');
        match key.trim().to_ascii_lowercase().as_str() {
            "q" => quality = parse_quality(value)?,
            "g" => special[0] = Some(value),
            "v" => special[1] = Some(value),
            "as" => special[2] = Some(value),
            _ => {}
        }
    }
    let form = match (essence.as_str(), special) {
        ("*/*" | "application/*" | "application/json", [None, None, None]) => Form::Plain,
        ("application/json", [Some("apidiscovery.k8s.io"), Some(version), Some("APIGroupDiscoveryList")]) => {
            Form::Aggregated(["v2", "v2beta1"].into_iter().find(|served| *served == version)?)
        }
        _ => return None,
    };
    Some((quality, form))
}

fn parse_quality(text: &str) -> Option<u16> {
    let quality: f32 = text.parse().ok()?;
    (0.0..=1.0).contains(&quality).then(|| (quality * 1000.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_chooses_the_form_of_apis() {
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
        let v2beta1 = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
        let (newer, older) = (Form::Aggregated("v2"), Form::Aggregated("v2beta1"));
        let table = [
            (format!("{v2},{v2beta1}"), newer),
            (format!("{v2},{v2beta1},application/json"), newer),
            (format!("{v2beta1}, {v2}, application/json"), older),
            (format!("application/json, {v2}"), Form::Plain),
            (format!("*/*, {v2}"), Form::Plain),
            (format!("{v2};q=0.2, {v2beta1};q=0.9"), older),
            (format!("{v2};q=0, {v2beta1}"), older),
            (format!("{v2};q=0.1, application/json;q=0.5, */*"), Form::Plain),
            (v2beta1.to_owned(), older),
            ("Application/JSON; AS=APIGroupDiscoveryList ; V=\"v2\" ; G=apidiscovery.k8s.io".to_owned(), newer),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/json;g=apidiscovery.k8s.io;v=v3;as=APIGroupDiscoveryList,*/*".to_owned(), Form::Plain),
            ("application/json;v=v2;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/*;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList".to_owned(), Form::NotAcceptable),
            ("application/json".to_owned(), Form::Plain),
            ("application/yaml".to_owned(), Form::NotAcceptable),
            (String::new(), Form::Plain),
        ];
        for (accept, form) in table {
            assert_eq!(negotiate_apis(Some(&accept)), form, "{accept}");
        }
        assert_eq!(negotiate_apis(None), Form::Plain);
    }

    #[test]
    fn json_is_acceptable_unless_refused_or_left_out() {
        let table = [
            ("application/vnd.kubernetes.protobuf, */*", true),
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", true),
            ("application/json; charset=utf-8", true),
            ("text/html, application/*;q=0.1", true),
            ("*/*;q=0.001", true),
            (" , ,", true),
            ("APPLICATION/JSON", true),
            ("application/json;q=1.000", true),
            ("application/json;q=0, application/json", true),
            ("application/vnd.kubernetes.protobuf", false),
            ("application/yaml, text/html", false),
            ("application/json;as=Table;v=v1;g=meta.k8s.io", false),
            ("application/json;q=0", false),
            ("application/json;q=0, */*", true),
            ("application/*;q=0.0, application/yaml", false),
            ("application/json;q=nan", false),
            ("application/json;q=inf", false),
            ("application/json;q=-1", false),
            ("application/json;q=2", false),
            ("application/json;q=", false),
            ("application/jsonp", false),
            ("application", false),
            ("*", false),
            (";;==", false),
            ("é", false),
        ];
        for (accept, acceptable) in table {
            assert_eq!(accepts_json(Some(accept)), acceptable, "{accept}");
        }
        assert!(accepts_json(None));
    }

    #[test]
    fn only_the_first_ranges_of_an_endless_header_count() {
        assert!(accepts_json(Some(&("text/html,".repeat(MAX_RANGES - 1) + "*/*"))));
        assert!(!accepts_json(Some(&("text/html,".repeat(100_000) + "*/*"))));
        assert!(accepts_json(Some(&(",".repeat(1_000_000) + "*/*"))));
        assert!(accepts_json(Some(&("application/json".to_owned() + &";a=b".repeat(250_000)))));
    }

    #[test]
    fn a_tag_is_quoted_hexadecimal_and_follows_the_body() {
        for document in ["", "{}"] {
            let tag = etag(document.as_bytes());
            let hex = tag.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
            assert!(hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)), "{hex}");
            assert_eq!(tag, etag(document.as_bytes()));
        }
        assert_ne!(etag(b"a"), etag(b"b"));
        assert_eq!(etag(b""), etag(b""));
    }

    #[test]
    fn a_known_tag_means_not_modified() {
        let table = [
            (None, false),
            (Some(""), false),
            (Some("\"A1\""), true),
            (Some("W/\"A1\""), true),
            (Some("*"), true),
            (Some("\"B2\", \"A1\""), true),
            (Some(" \"B2\",W/\"A1\" "), true),
            (Some("A1"), false),
            (Some("\"a1\""), false),
            (Some("w/\"A1\""), false),
            (Some("\"B2\""), false),
            (Some("\"A1\"x"), false),
            (Some(",,,"), false),
            (Some("\"*\""), false),
        ];
        for (if_none_match, expected) in table {
            assert_eq!(not_modified(if_none_match, "\"A1\""), expected, "{if_none_match:?}");
        }
    }
}
