//! The serving certificate that the adapter makes for itself, and how the API server comes to trust it.
//! An authority and a certificate for the Service's names lie in one Secret, so that replicas and restarts agree.
//! The authority is published in `caBundle` of our APIServices before a certificate of it is used.
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/api-service-v1/>.

use crate::prelude::*;
use crate::tls::{base64, certificates, certified_key, decode_base64, pem, verified};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};

const SECRET: &str = "custom-metrics-apiserver-certificate";
const DAY: u64 = 86_400;
const CERTIFICATE_DAYS: u64 = 90;
const AUTHORITY_DAYS: u64 = 3650;
/// Until every API server has heard of a new authority.
const PUBLISH: Duration = Duration::from_secs(2);
/// Authorities in a bundle: our own, and what was there before.
const MOST_AUTHORITIES: usize = 4;

pub(crate) struct Keeper {
    pub(crate) kube: &'static Kube,
    pub(crate) serving: Arc<Serving>,
    pub(crate) namespace: String,
}

/// What lies in the Secret, in PEM: the authority (and behind it the one before), its certificate, and their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    authority: String,
    authority_key: String,
    chain: String,
    key: String,
}

impl Keeper {
    /// Serves a certificate that nobody trusts, until there is a better one. Errors: It cannot be made.
    pub(crate) fn start(&self) -> Result<(), String> {
        let made = Kept::make(None, &self.names(), unix_now()).map_err(|error| error.message)?;
        certified_key(made.chain, made.key).map(|pair| *lock(&self.serving.key) = Some(pair))
    }

    /// Looks after all of it once, and tells whether it is as it should be.
    pub(crate) fn keep(&self) -> bool {
        let kept = metrics::noted("serving certificate", self.round()).is_ok();
        self.serving.settled.store(true, Relaxed);
        kept
    }

    fn round(&self) -> Result<(), Error> {
        // Of replicas that start together one writes the Secret, and the others read it.
        let conflict = |error: &Error| error.reason == Reason::KubernetesConflict;
        let kept = self.kept().or_else(|error| if conflict(&error) { self.kept() } else { Err(error) })?;
        let apis = APIS.iter().take(2 + usize::from(self.kube.config.external));
        // Each has its turn, whatever becomes of the others.
        let published = apis.map(|(group, version)| self.publish(&format!("{version}.{group}"), &kept.authority));
        let published = published.fold(Ok(()), Result::and);
        let failed = published.as_ref().is_err_and(|error| error.reason != Reason::ForeignSlot);
        // What is in use may be all that the API server trusts; at the start there is nothing to lose.
        if !failed || !self.serving.settled.load(Relaxed) {
            *lock(&self.serving.key) = Some(certified_key(kept.chain, kept.key).map_err(|why| refusal!(Internal, "{why}"))?);
        }
        published
    }

    /// What lies in the Secret, made anew when it is missing, unusable or due.
    fn kept(&self) -> Result<Kept, Error> {
        let (namespace, names, now) = (&self.namespace, self.names(), unix_now());
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{SECRET}");
        let what = format!("Secret {SECRET} in namespace {namespace}");
        let mut secret = self.kube.call(Method::GET, &path, JSON, None, &what)?;
        let made = match Kept::read(&secret) {
            Some(kept) if kept.check(&names, now).is_some() => return Ok(kept),
            found => Kept::make(found, &names, now)?,
        };
        let _ = secret.as_object_mut().map(|fields| fields.insert("data".to_owned(), made.data()));
        self.kube.call(Method::PUT, &path, JSON, Some(&secret), &what).map(|_| made)
    }

    /// The names that the API server may ask for; the first is what it does ask for.
    fn names(&self) -> Vec<String> {
        let (service, place) = (&self.kube.config.service_name, &self.namespace);
        let names = format!("{service}.{place}.svc {service}.{place}.svc.cluster.local {service}.{place} {service} localhost");
        names.split(' ').map(str::to_owned).collect()
    }

    /// Makes an APIService of ours trust `authority` beside what it trusts, and gives the news its time if that was another.
    fn publish(&self, name: &str, authority: &str) -> Result<(), Error> {
        let (before, path, what) = slot(self.kube, &self.namespace, name)?;
        let old = before["spec"]["caBundle"].as_str().and_then(decode_base64).and_then(|pem| certificates(pem).ok());
        let old = old.unwrap_or_default();
        let ours = certificates(authority).map_err(|why| refusal!(Internal, "{why}"))?;
        if ours.iter().all(|certificate| old.contains(certificate)) {
            return Ok(());
        }
        let kept = old.iter().filter(|certificate| !ours.contains(certificate));
        let bundle: String = ours.iter().chain(kept).take(MOST_AUTHORITIES).map(|der| pem("CERTIFICATE", der)).collect();
        let patch = json!({ "spec": { "caBundle": base64(bundle) } });
        let after = self.kube.call(Method::PATCH, &path, JSON, Some(&patch), &what)?;
        ensure!(after["spec"]["caBundle"] == patch["spec"]["caBundle"], Internal, "{what} does not keep its caBundle");
        thread::sleep(if before.pointer("/spec/caBundle").is_some() { PUBLISH } else { Duration::ZERO });
        Ok(())
    }
}

/// An APIService, its path and what to call it. Errors: it is not ours, or does not verify what it reaches.
pub(crate) fn slot(kube: &Kube, namespace: &str, name: &str) -> Result<(Value, String, String)> {
    let (path, what) = (format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}"), format!("APIService {name}"));
    let found = kube.call(Method::GET, &path, JSON, None, &what)?;
    let (place, owner) = (text(&found, "/spec/service/namespace"), text(&found, "/spec/service/name"));
    let ours = (place, owner) == (namespace, kube.config.service_name.as_str());
    ensure!(ours, ForeignSlot, "{what} belongs to Service {place}/{owner} and is left alone");
    let mend = r#"--type=json -p='[{"op":"remove","path":"/spec/insecureSkipTLSVerify"}]'"#;
    let why = format!("does not verify the adapter's certificate; mend: kubectl patch apiservice {name} {mend}");
    ensure!(found["spec"]["insecureSkipTLSVerify"] != true, ForeignSlot, "{what} {why}");
    Ok((found, path, what))
}

impl Kept {
    fn read(secret: &Value) -> Option<Self> {
        let text = |key: &str| String::from_utf8(decode_base64(secret.get("data")?.get(key)?.as_str()?)?).ok();
        Some(Self { authority: text("ca.crt")?, authority_key: text("ca.key")?, chain: text("tls.crt")?, key: text("tls.key")? })
    }

    fn data(&self) -> Value {
        let [authority, authority_key, chain, key] = [&self.authority, &self.authority_key, &self.chain, &self.key].map(base64);
        json!({ "ca.crt": authority, "ca.key": authority_key, "tls.crt": chain, "tls.key": key })
    }

    /// Some if the certificate fits its key and is one of the authority for `names`, and neither of them is due.
    fn check(&self, names: &[String], now: u64) -> Option<()> {
        let (authorities, pair) = (certificates(&self.authority).ok()?, certified_key(&self.chain, &self.key).ok()?);
        let certificate = pair.cert.get(..1)?;
        let leaf = verified(certificate, &authorities, webpki::KeyUsage::server_auth(), now).ok()?;
        let fits = |name: &String| leaf.verify_is_valid_for_subject_name(&ServerName::try_from(name.as_str()).ok()?).ok();
        names.iter().try_for_each(fits)?;
        (lasts(certificate, CERTIFICATE_DAYS, now) && lasts(authorities.get(..1)?, AUTHORITY_DAYS, now)).then_some(())
    }

    /// A new certificate, of the authority that is there until that is due. The old one stays trusted until the next.
    fn make(old: Option<Self>, names: &[String], now: u64) -> Result<Self, Error> {
        let text = |error: rcgen::Error| refusal!(Internal, "a certificate cannot be made: {error}");
        let mut authority = params("sysdig-metrics-adapter-ca", &[], now, AUTHORITY_DAYS).map_err(text)?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let mut made = old.unwrap_or_default();
        let before = certificates(&made.authority).unwrap_or_default();
        let kept = PrivateKeyDer::from_pem_slice(made.authority_key.as_bytes()).ok().and_then(|it| KeyPair::try_from(&it).ok());
        let kept = kept.filter(|_| before.get(..1).is_some_and(|authority| lasts(authority, AUTHORITY_DAYS, now)));
        let (anew, key) = (kept.is_none(), kept.map_or_else(KeyPair::generate, Ok).map_err(text)?);
        if anew {
            let new = authority.self_signed(&key).map_err(text)?;
            made.authority = iter::once(new.der()).chain(before.first()).map(|der| pem("CERTIFICATE", der)).collect();
            made.authority_key = pem("PRIVATE KEY", &key.serialize_der());
        }
        let (issuer, key) = (Issuer::new(authority, key), KeyPair::generate().map_err(text)?);
        let mut params = params("sysdig-metrics-adapter", names, now, CERTIFICATE_DAYS).map_err(text)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        made.chain = pem("CERTIFICATE", params.signed_by(&key, &issuer).map_err(text)?.der());
        made.key = pem("PRIVATE KEY", &key.serialize_der());
        Ok(made)
    }
}

/// When a certificate ends, in Unix seconds: without any authority it is refused, but once expired for that.
pub(crate) fn end(chain: &[CertificateDer<'_>]) -> u64 {
    let later = verified(chain, &[], webpki::KeyUsage::server_auth(), u64::MAX);
    if let Err(webpki::Error::CertExpired { not_after, .. }) = later { not_after.as_secs() } else { 0 }
}

/// Whether a third of so many days is left.
fn lasts(certificate: &[CertificateDer<'_>], days: u64, now: u64) -> bool {
    now + days * DAY / 3 <= end(certificate)
}

/// Valid from an hour ago, for clocks that are late.
fn params(subject: &str, names: &[String], now: u64, days: u64) -> Result<CertificateParams, rcgen::Error> {
    let at = |seconds| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, subject);
    (params.not_before, params.not_after) = (at(now.saturating_sub(3600)), at(now + days * DAY));
    Ok(params)
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
        for (now, good) in [(NOW, true), (NOW + 59 * DAY, true), (NOW + 60 * DAY + 1, false), (NOW - 2 * DAY, false)] {
            assert_eq!(made.check(&names(), now).is_some(), good, "{now}");
        }
        assert!(made.check(&["other.svc".to_owned()], NOW).is_none());
        let authority = &certificates(&made.authority).unwrap();
        let third = AUTHORITY_DAYS * DAY / 3;
        let (lasts, is_due) = (NOW + AUTHORITY_DAYS * DAY - third, NOW + AUTHORITY_DAYS * DAY - third + 1);
        assert!(super::lasts(authority, AUTHORITY_DAYS, lasts) && !super::lasts(authority, AUTHORITY_DAYS, is_due));
    }

    #[test]
    fn it_survives_the_secret() {
        let made = Kept::make(None, &names(), NOW).unwrap();
        let mut secret = json!({ "data": made.data() });
        secret["data"]["renew"] = json!("a field of earlier versions");
        assert_eq!(Kept::read(&secret), Some(made));
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
        assert!(second.check(&names(), later).is_some());
        let due = NOW + AUTHORITY_DAYS * DAY * 2 / 3 + DAY;
        let third = Kept::make(Some(second), &names(), due).unwrap();
        assert!(third.check(&names(), due).is_some());
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
            assert!(kept.check(&names(), NOW).is_none());
            assert!(Kept::make(Some(kept), &names(), NOW).unwrap().check(&names(), NOW).is_some());
        }
    }
}
