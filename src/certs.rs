//! The serving certificate that the adapter makes for itself, and how the API server comes to trust it.
//! An authority and a certificate for the Service's names lie in one Secret, so that replicas and restarts agree.
//! The authority is published in `caBundle` of our APIServices before a certificate of it is used.
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/api-service-v1/>.

use crate::error::{Error, Reason, refusal};
use crate::tls::{Serving, anchors, base64, certificates, certified_key, decode_base64, pem};
use crate::{changes::Changes, kube::FULL, kube::Kube, route::GROUP, route::VERSIONS, timestamp::unix_now};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use serde_json::{Value, json};
use std::{iter, sync::Arc, thread, time::Duration};
use ureq::http::Method;
use webpki::{EndEntityCert, KeyUsage};

const SECRET: &str = "custom-metrics-apiserver-certificate";
const DAY: u64 = 86_400;
const CERTIFICATE_DAYS: u64 = 90;
const AUTHORITY_DAYS: u64 = 3650;
/// Until every API server has heard of a new authority.
const PUBLISH: Duration = Duration::from_secs(2);
/// Replicas that start together write one after the other.
const ATTEMPTS: usize = 5;
/// Authorities in a bundle: our own, and what was there before.
const MOST_AUTHORITIES: usize = 4;

pub(crate) struct Keeper {
    pub(crate) kube: Arc<Kube>,
    pub(crate) serving: Arc<Serving>,
    pub(crate) changes: Arc<Changes>,
    pub(crate) service: String,
    pub(crate) namespace: String,
}

/// What lies in the Secret; all but the last two in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    authority: String,
    authority_key: String,
    chain: String,
    key: String,
    renew: u64,
    renew_authority: u64,
}

impl Keeper {
    /// Serves a certificate that nobody trusts, until there is a better one. Errors: It cannot be made.
    pub(crate) fn start(&self) -> Result<(), String> {
        let made = Kept::make(None, &self.names(), unix_now())?;
        certified_key(made.chain, made.key).map(|pair| self.serving.replace(pair))
    }

    /// Looks after all of it once, and tells whether it is as it should be.
    pub(crate) fn keep(&self) -> bool {
        let result = self.round();
        self.changes.note("serving certificate", &result);
        self.serving.settle();
        result.is_ok()
    }

    fn round(&self) -> Result<(), Error> {
        let kept = self.kept(unix_now())?;
        let published = self.publish(&kept.authority);
        let failed = published.as_ref().is_err_and(|error| error.reason != Reason::ForeignSlot);
        // What is in use may be all that the API server trusts; at the start there is nothing to lose.
        if !failed || !self.serving.is_settled() {
            self.serving.replace(certified_key(kept.chain, kept.key).map_err(broken)?);
        }
        published
    }

    /// What lies in the Secret, made anew when it is missing, unusable or due.
    fn kept(&self, now: u64) -> Result<Kept, Error> {
        let (namespace, names) = (&self.namespace, self.names());
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{SECRET}");
        let what = format!("Secret {SECRET} in namespace {namespace}");
        let mut conflict = broken("the Secret is written by others all the time".to_owned());
        for _ in 0..ATTEMPTS {
            let mut secret = self.kube.call(Method::GET, &path, FULL, None, &what)?;
            let found = Kept::read(&secret);
            if let Some(kept) = found.as_ref().filter(|kept| kept.is_good(&names, now)) {
                return Ok(kept.clone());
            }
            let made = Kept::make(found, &names, now).map_err(broken)?;
            let _ = secret.as_object_mut().map(|fields| fields.insert("data".to_owned(), made.data()));
            match self.kube.call(Method::PUT, &path, FULL, Some(&secret), &what) {
                Ok(_) => return Ok(made),
                Err(error) if error.reason == Reason::KubernetesConflict => conflict = error,
                Err(error) => return Err(error),
            }
        }
        Err(conflict)
    }

    /// The names that the API server may ask for; the first is what it does ask for.
    fn names(&self) -> Vec<String> {
        let name = format!("{}.{}", self.service, self.namespace);
        let (full, service) = (format!("{name}.svc.cluster.local"), self.service.clone());
        vec![format!("{name}.svc"), full, name, service, "localhost".to_owned()]
    }

    /// Makes our APIServices trust `authority`, and gives the news its time where one of them trusted another.
    fn publish(&self, authority: &str) -> Result<(), Error> {
        let results = VERSIONS.map(|version| self.publish_one(&format!("{version}.{GROUP}"), authority));
        if results.contains(&Ok(true)) {
            thread::sleep(PUBLISH);
        }
        results.into_iter().try_for_each(|result| result.map(drop))
    }

    fn publish_one(&self, name: &str, authority: &str) -> Result<bool, Error> {
        let path = format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}");
        let what = format!("APIService {name}");
        let before = self.kube.call(Method::GET, &path, FULL, None, &what)?;
        let Some(bundle) = self.bundle(&before, name, authority)? else { return Ok(false) };
        let patch = json!({ "spec": { "caBundle": base64(bundle) } });
        let after = self.kube.call(Method::PATCH, &path, FULL, Some(&patch), &what)?;
        match self.bundle(&after, name, authority)? {
            None => Ok(before.pointer("/spec/caBundle").is_some()),
            Some(_) => Err(broken(format!("{what} does not keep its caBundle"))),
        }
    }

    /// The bundle that an APIService should have; None if it is as it should be.
    fn bundle(&self, service: &Value, name: &str, authority: &str) -> Result<Option<String>, Error> {
        let text = |pointer: &str| service.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (place, owner) = (text("/spec/service/namespace"), text("/spec/service/name"));
        if (place, owner) != (&self.namespace, &self.service) {
            let what = format!("APIService {name} belongs to Service {place}/{owner}");
            return Err(refusal!(ForeignSlot, "{what} and is left alone"));
        }
        if service.pointer("/spec/insecureSkipTLSVerify") == Some(&Value::Bool(true)) {
            let what = format!("APIService {name} does not verify the adapter's certificate");
            let patch = r#"--type=json -p='[{"op":"remove","path":"/spec/insecureSkipTLSVerify"}]'"#;
            return Err(refusal!(ForeignSlot, "{what}; mend: kubectl patch apiservice {name} {patch}"));
        }
        let old = decode_base64(text("/spec/caBundle")).and_then(|pem| certificates(pem).ok()).unwrap_or_default();
        let ours = certificates(authority).map_err(broken)?;
        if ours.iter().all(|certificate| old.contains(certificate)) {
            return Ok(None);
        }
        let kept = old.iter().filter(|certificate| !ours.contains(certificate));
        Ok(Some(ours.iter().chain(kept).take(MOST_AUTHORITIES).map(|der| pem("CERTIFICATE", der)).collect()))
    }
}

impl Kept {
    fn read(secret: &Value) -> Option<Self> {
        let text = |key: &str| String::from_utf8(decode_base64(secret.get("data")?.get(key)?.as_str()?)?).ok();
        let (authority, authority_key) = (text("ca.crt")?, text("ca.key")?);
        let (chain, key) = (text("tls.crt")?, text("tls.key")?);
        let (renew, renew_authority) = (text("renew")?.parse().ok()?, text("renew-ca")?.parse().ok()?);
        Some(Self { authority, authority_key, chain, key, renew, renew_authority })
    }

    fn data(&self) -> Value {
        let Self { authority, authority_key, chain, key, renew, renew_authority } = self;
        json!({
            "ca.crt": base64(authority), "ca.key": base64(authority_key), "tls.crt": base64(chain),
            "tls.key": base64(key), "renew": base64(renew.to_string()), "renew-ca": base64(renew_authority.to_string()),
        })
    }

    /// Whether the certificate is not due, fits its key, and is one of the authority for `names`.
    fn is_good(&self, names: &[String], now: u64) -> bool {
        let verify = || -> Option<()> {
            let anchors = anchors(&self.authority).ok()?;
            let chain = certificates(&self.chain).ok()?;
            let leaf = EndEntityCert::try_from(chain.first()?).ok()?;
            let time = UnixTime::since_unix_epoch(Duration::from_secs(now));
            let (algorithms, usage) = (webpki::ALL_VERIFICATION_ALGS, KeyUsage::server_auth());
            leaf.verify_for_usage(algorithms, &anchors, &[], time, usage, None, None).ok()?;
            for name in names {
                leaf.verify_is_valid_for_subject_name(&ServerName::try_from(name.as_str()).ok()?).ok()?;
            }
            certified_key(&self.chain, &self.key).ok().map(drop)
        };
        now < self.renew && now < self.renew_authority && verify().is_some()
    }

    /// A new certificate, of the authority that is there until that is due. The old one stays trusted until the next.
    fn make(old: Option<Self>, names: &[String], now: u64) -> Result<Self, String> {
        let text = |error: rcgen::Error| format!("a certificate cannot be made: {error}");
        let mut authority = params("sysdig-metrics-adapter-ca", &[], now, AUTHORITY_DAYS).map_err(text)?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let mut made = old.unwrap_or_default();
        let before = certificates(&made.authority).unwrap_or_default();
        let due = before.is_empty() || now >= made.renew_authority;
        let kept = PrivateKeyDer::from_pem_slice(made.authority_key.as_bytes()).ok().filter(|_| !due);
        let kept = kept.and_then(|der| KeyPair::try_from(&der).ok());
        let (anew, key) = (kept.is_none(), kept.map_or_else(KeyPair::generate, Ok).map_err(text)?);
        if anew {
            let new = authority.self_signed(&key).map_err(text)?;
            made.authority = iter::once(new.der()).chain(before.first()).map(|der| pem("CERTIFICATE", der)).collect();
            made.authority_key = pem("PRIVATE KEY", &key.serialize_der());
            made.renew_authority = now + AUTHORITY_DAYS * DAY * 2 / 3;
        }
        let issuer = Issuer::new(authority, key);
        let key = KeyPair::generate().map_err(text)?;
        let mut params = params("sysdig-metrics-adapter", names, now, CERTIFICATE_DAYS).map_err(text)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        made.chain = pem("CERTIFICATE", params.signed_by(&key, &issuer).map_err(text)?.der());
        made.key = pem("PRIVATE KEY", &key.serialize_der());
        made.renew = now + CERTIFICATE_DAYS * DAY * 2 / 3;
        Ok(made)
    }
}

/// Valid from an hour ago, for clocks that are late.
fn params(subject: &str, names: &[String], now: u64, days: u64) -> Result<CertificateParams, rcgen::Error> {
    let at = |seconds| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, subject);
    (params.not_before, params.not_after) = (at(now.saturating_sub(3600)), at(now + days * DAY));
    Ok(params)
}

fn broken(why: String) -> Error {
    Error::new(Reason::Internal, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn names() -> Vec<String> {
        vec!["api.custom-metrics.svc".to_owned(), "localhost".to_owned()]
    }

    #[test]
    fn a_made_certificate_is_good_until_it_is_due() {
        let made = Kept::make(None, &names(), NOW).unwrap();
        for (now, good) in [(NOW, true), (NOW + 59 * DAY, true), (NOW + 60 * DAY, false), (NOW - 2 * DAY, false)] {
            assert_eq!(made.is_good(&names(), now), good, "{now}");
        }
        assert!(!made.is_good(&["other.svc".to_owned()], NOW));
    }

    #[test]
    fn it_survives_the_secret() {
        let made = Kept::make(None, &names(), NOW).unwrap();
        assert_eq!(Kept::read(&json!({ "data": made.data() })), Some(made));
        for empty in [json!({}), json!({ "data": null }), json!({ "data": { "ca.crt": "!" } })] {
            assert_eq!(Kept::read(&empty), None, "{empty}");
        }
    }

    #[test]
    fn renewal_keeps_the_authority_until_that_is_due() {
        let first = Kept::make(None, &names(), NOW).unwrap();
        let later = NOW + 61 * DAY;
        let second = Kept::make(Some(first.clone()), &names(), later).unwrap();
        assert_eq!((&second.authority, &second.authority_key), (&first.authority, &first.authority_key));
        assert_ne!(second.chain, first.chain);
        assert!(second.is_good(&names(), later));
        let due = first.renew_authority + 1;
        let third = Kept::make(Some(second), &names(), due).unwrap();
        assert!(third.is_good(&names(), due));
        assert!(third.authority.contains(&first.authority), "the old authority is trusted beside the new one");
        assert_ne!(third.authority, first.authority);
    }

    #[test]
    fn a_damaged_secret_is_made_anew() {
        let good = Kept::make(None, &names(), NOW).unwrap();
        let other = Kept::make(None, &names(), NOW).unwrap();
        let damaged = [
            Kept { authority: String::new(), ..good.clone() },
            Kept { authority_key: "x".to_owned(), chain: other.chain.clone(), ..good.clone() },
            Kept { key: other.key.clone(), ..good.clone() },
            Kept { chain: other.chain, key: other.key, ..good },
        ];
        for kept in damaged {
            assert!(!kept.is_good(&names(), NOW));
            assert!(Kept::make(Some(kept), &names(), NOW).unwrap().is_good(&names(), NOW));
        }
    }
}
