{{- define "turret.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "turret" $name) }}{{ $name = printf "%s-turret" $name }}{{ end -}}
{{- $name | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "turret.selector" -}}
app.kubernetes.io/name: turret
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "turret.labels" -}}
{{ include "turret.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "turret.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The Secret with the token file; empty if there is none. */}}
{{- define "turret.tokens" -}}
{{- if .Values.tokens.existingSecret }}{{ .Values.tokens.existingSecret }}
{{- else if .Values.tokens.lines }}{{ include "turret.name" . }}-tokens{{ end -}}
{{- end }}

{{/* The settings that the chart sets. Allowed hosts are the names of the Service, which KubeRay makes
     for a fleet. */}}
{{- define "turret.owned" -}}
{{- $name := include "turret.name" . -}}
{{- if eq .Values.mode "fleet" }}{{ $name = printf "%s-serve-svc" $name }}{{ end -}}
{{- $ns := .Release.Namespace -}}
adapters:
  adapter_root: /adapters
  state_dir: /state
listen:
  address: 0.0.0.0:50051
  http_address: 0.0.0.0:8000
  metrics_address: 0.0.0.0:9464
  {{- if not (get (.Values.settings.listen | default dict) "http_allowed_host") }}
  http_allowed_host:
    - {{ $name }}
    - {{ $name }}.{{ $ns }}
    - {{ $name }}.{{ $ns }}.svc
    - {{ $name }}.{{ $ns }}.svc.cluster.local
  {{- end }}
security:
  insecure: true
  {{- if include "turret.tokens" . }}
  token_file: /etc/turret/tokens
  {{- end }}
lifecycle:
  grace_seconds: {{ sub .Values.terminationGracePeriodSeconds 10 }}
{{- end }}

{{/* A value in TOML, where only tables differ from JSON. */}}
{{- define "turret.toml" -}}
{{- if kindIs "map" . -}}
{ {{- $sep := " " }}{{ range $key, $value := . }}{{ $sep }}{{ $key | quote }} = {{ include "turret.toml" $value }}{{ $sep = ", " }}{{ end }} }
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* A claim's specification, from its size, accessModes and storageClassName. */}}
{{- define "turret.claim" -}}
accessModes: {{ toJson (.accessModes | default (list "ReadWriteOnce")) }}
{{- if .storageClassName }}
storageClassName: {{ .storageClassName }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end }}

{{- define "turret.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The fields that decide where a release's pods run. */}}
{{- define "turret.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{/* The volumes of the settings, the token file and the credentials for registries. */}}
{{- define "turret.readVolumes" -}}
- name: configuration
  configMap: {name: {{ include "turret.name" . }}}
{{- with include "turret.tokens" . }}
- name: tokens
  secret: {secretName: {{ . }}}
{{- end }}
{{- with .Values.registrySecret }}
- name: registry
  secret:
    secretName: {{ . }}
    items: [{key: .dockerconfigjson, path: config.json}]
{{- end }}
{{- end }}

{{- define "turret.readMounts" -}}
- {name: configuration, mountPath: /etc/turret-config, readOnly: true}
{{- if include "turret.tokens" . }}
- {name: tokens, mountPath: /etc/turret, readOnly: true}
{{- end }}
{{- if .Values.registrySecret }}
- {name: registry, mountPath: /home/turret/.docker, readOnly: true}
{{- end }}
{{- end }}

{{- define "turret.adaptersClaim" -}}
{{ .Values.adapters.existingClaim | default (printf "%s-adapters" (include "turret.name" .)) }}
{{- end }}
