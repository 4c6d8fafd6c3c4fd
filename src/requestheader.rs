//! Which client certificates speak for users: ConfigMap kube-system/extension-apiserver-authentication.
//! Source: <https://kubernetes.io/docs/tasks/extend-kubernetes/configure-aggregation-layer/>.

use crate::prelude::*;
use crate::{der::common_name, head::IdentityHeaders, tls::certificates, tls::verified};
use rustls::pki_types::CertificateDer;

pub struct RequestHeader {
    authorities: Vec<CertificateDer<'static>>,
    allowed_names: Vec<String>,
    pub headers: IdentityHeaders,
}

impl RequestHeader {
    /// Understands the ConfigMap, given as a JSON object. Errors: Names the key that is missing or wrong.
    pub fn parse(config_map: &Value) -> Result<Self, String> {
        let text = |key: &str| config_map["data"][format!("requestheader-{key}")].as_str().unwrap_or_default();
        let array = |key: &str| -> Result<Vec<String>, String> {
            let array = if text(key).is_empty() { "[]" } else { text(key) };
            serde_json::from_str(array).map_err(|_| format!("requestheader-{key} is not a JSON array of strings"))
        };
        let list = |key| array(key).map(|names| names.iter().map(|name| name.to_ascii_lowercase()).collect::<Vec<_>>());
        let headers = [list("username-headers")?, list("uid-headers")?, list("group-headers")?, list("extra-headers-prefix")?];
        let ask = "is the aggregation layer configured?";
        headers[0].first().ok_or_else(|| format!("requestheader-username-headers is missing: {ask}"))?;
        let authorities = certificates(text("client-ca-file"));
        let authorities = authorities.map_err(|mistake| format!("requestheader-client-ca-file holds {mistake}: {ask}"))?;
        Ok(Self { authorities, allowed_names: array("allowed-names")?, headers })
    }

    /// Whether a client certificate chain, leaf first, may name users at `now` (Unix seconds). Errors: Why not, for the log.
    pub fn judge(&self, chain: &[CertificateDer<'_>], now: u64) -> Result<(), String> {
        let leaf = verified(chain, &self.authorities, webpki::KeyUsage::client_auth(), now).map_err(|error| error.to_string())?;
        let (name, allowed) = (common_name(leaf.subject()), &self.allowed_names);
        let fits = allowed.is_empty() || name.as_ref().is_some_and(|name| allowed.contains(name));
        if fits { Ok(()) } else { Err(format!("common name {name:?} is not in requestheader-allowed-names")) }
    }
}

/// The configuration in force; the last good one stays when a later one is bad.
pub(crate) struct Trust {
    pub(crate) kube: &'static Kube,
    pub(crate) current: Mutex<Option<Arc<RequestHeader>>>,
    /// When the ConfigMap was asked for last.
    pub(crate) asked: Mutex<Option<Instant>>,
}

impl Trust {
    /// What the ConfigMap says now. All who call meanwhile share the next read, or go without it if they cannot wait.
    pub(crate) fn refreshed(&self, wait: bool) -> Option<Arc<RequestHeader>> {
        let called = Instant::now();
        let mut asked = if wait { lock(&self.asked) } else { self.asked.try_lock().ok()? };
        // Whatever calls for it, the ConfigMap is not read more often than once a second.
        let early = asked.map_or(Duration::ZERO, |at| Duration::from_secs(1).saturating_sub(at.elapsed()));
        if asked.is_none_or(|at| at < called) && (wait || early.is_zero()) {
            thread::sleep(early);
            *asked = Some(Instant::now());
            if let Ok(found) = metrics::noted("request header configuration", self.kube.request_header()) {
                *lock(&self.current) = Some(Arc::new(found));
            }
        }
        lock(&self.current).clone()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    use serde_json::json;

    use super::*;
    use crate::tls::pem;

    struct Ca(Issuer<'static, KeyPair>, String);

    fn ca() -> Ca {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let text = pem("CERTIFICATE", params.self_signed(&key).unwrap().der());
        Ca(Issuer::new(params, key), text)
    }

    impl Ca {
        fn leaf(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> CertificateDer<'static> {
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages = vec![usage];
            params.signed_by(&KeyPair::generate().unwrap(), &self.0).unwrap().der().clone()
        }
    }

    fn config_map(pem: &str, names: &str) -> Value {
        json!({ "data": {
            "requestheader-client-ca-file": pem,
            "requestheader-allowed-names": names,
            "requestheader-username-headers": "[\"X-Remote-User\"]",
            "requestheader-group-headers": "[\"X-Remote-Group\"]",
            "requestheader-extra-headers-prefix": "[\"X-Remote-Extra-\"]",
        }})
    }

    #[test]
    fn only_the_configured_names_of_the_configured_authorities_speak_for_users() {
        let (ours, other) = (ca(), ca());
        let both = format!("{}{}", other.1, ours.1);
        let client = || ExtendedKeyUsagePurpose::ClientAuth;
        let table = [
            ("right", &ours.1, r#"["a","front-proxy-client"]"#, ours.leaf("front-proxy-client", client()), true),
            ("any name", &ours.1, "[]", ours.leaf("whoever", client()), true),
            ("no list", &ours.1, "", ours.leaf("whoever", client()), true),
            ("two authorities", &both, r#"["front-proxy-client"]"#, ours.leaf("front-proxy-client", client()), true),
            ("wrong name", &ours.1, r#"["front-proxy-client"]"#, ours.leaf("joe", client()), false),
            ("rogue authority", &ours.1, r#"["front-proxy-client"]"#, other.leaf("front-proxy-client", client()), false),
            ("server certificate", &ours.1, "[]", ours.leaf("front-proxy-client", ExtendedKeyUsagePurpose::ServerAuth), false),
        ];
        for (case, pem, names, leaf, allowed) in table {
            let config = RequestHeader::parse(&config_map(pem, names)).unwrap();
            assert_eq!(config.judge(&[leaf], unix_now()).is_ok(), allowed, "{case}");
        }
        let config = RequestHeader::parse(&config_map(&ours.1, "[]")).unwrap();
        assert!(config.judge(&[], unix_now()).is_err());
        assert!(config.judge(&[CertificateDer::from(vec![0x30, 0])], unix_now()).is_err());
    }

    #[test]
    fn a_certificate_counts_while_it_is_valid_only() {
        let ours = ca();
        let config = RequestHeader::parse(&config_map(&ours.1, "[]")).unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 1, 2);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&KeyPair::generate().unwrap(), &ours.0).unwrap().der().clone();
        let day = 1_577_836_800;
        for (now, valid) in [(day - 1, false), (day + 3600, true), (day + 86_401, false)] {
            assert_eq!(config.judge(std::slice::from_ref(&leaf), now).is_ok(), valid, "{now}");
        }
    }

    #[test]
    fn a_broken_config_map_is_refused_by_key() {
        let good = ca().1;
        let table = [
            (json!({}), "requestheader-username-headers"),
            (json!({ "data": { "requestheader-username-headers": "X-Remote-User" } }), "requestheader-username-headers"),
            (json!({ "data": { "requestheader-username-headers": "[\"u\"]" } }), "requestheader-client-ca-file"),
            (config_map("", "[]"), "requestheader-client-ca-file"),
            (config_map("not pem", "[]"), "requestheader-client-ca-file"),
            (config_map("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", "[]"), "requestheader-client-ca-file"),
            (config_map(&good, "[1]"), "requestheader-allowed-names"),
            (config_map(&good, "{}"), "requestheader-allowed-names"),
        ];
        for (config_map, key) in table {
            let mistake = RequestHeader::parse(&config_map).map(|_| ()).unwrap_err();
            assert!(mistake.contains(key), "{mistake}");
        }
    }
}
