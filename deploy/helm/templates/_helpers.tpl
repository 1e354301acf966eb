{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}

{{- /* A manifest of the base, named after a model, with selectors that choose that model's pods.
       Takes root, file, name. Returns YAML. */ -}}
{{- define "vllm-compress.manifest" -}}
{{- $found := .root.Files.Get .file | fromYaml -}}
{{- $name := printf "vllm-compress-%s" .name -}}
{{- $own := dict "app.kubernetes.io/instance" .name -}}
{{- $_ := set $found.metadata "name" $name -}}
{{- $_ := set $found.metadata "labels" (merge $own (default dict $found.metadata.labels)) -}}
{{- with $found.spec.selector -}}
  {{- if eq $found.kind "Service" -}}
    {{- $_ := mergeOverwrite . $own -}}
  {{- else -}}
    {{- $_ := mergeOverwrite .matchLabels $own -}}
  {{- end -}}
{{- end -}}
{{- with $found.spec.podSelector -}}{{- $_ := mergeOverwrite .matchLabels $own -}}{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{- /* The base's Deployment with what the overlay for its device changes, and the model's values.
       Takes root, name, model, config (a hash of the flags). Returns YAML. */ -}}
{{- define "vllm-compress.deployment" -}}
{{- $found := include "vllm-compress.manifest" (merge (dict "file" "base/deployment.yaml") .) | fromYaml -}}
{{- $gpus := int (default 0 .model.gpus) -}}
{{- $device := ternary "gpu" "cpu" (gt $gpus 0) -}}
{{- $overlay := .root.Files.Get (printf "overlays/%s/deployment.yaml" $device) | fromYaml -}}
{{- $change := $overlay.spec.template.spec -}}
{{- $template := $found.spec.template -}}
{{- $pod := $template.spec -}}
{{- $own := dict "app.kubernetes.io/instance" .name -}}
{{- $_ := mergeOverwrite $template.metadata.labels $own -}}
{{- $_ := set $template.metadata "annotations" (dict "checksum/config" .config) -}}
{{- range $pod.topologySpreadConstraints -}}{{- $_ := mergeOverwrite .labelSelector.matchLabels $own -}}{{- end -}}
{{- $_ := set $pod "priorityClassName" .root.Values.priorityClass.name -}}
{{- $_ := mergeOverwrite $pod (omit $change "containers" "volumes") -}}
{{- $server := first $pod.containers -}}
{{- $more := first $change.containers -}}
{{- $_ := mergeOverwrite $server.resources (default dict $more.resources) -}}
{{- if $gpus -}}{{- $_ := set $server.resources.limits "nvidia.com/gpu" (toString $gpus) -}}{{- end -}}
{{- $_ := mergeOverwrite $server.resources (default dict .model.resources) -}}
{{- $_ := set $server "env" (concat $server.env (default list $more.env) (default list .model.env)) -}}
{{- /* The model is fetched with the server's settings: HF_ENDPOINT, a proxy, another HF_HOME. */ -}}
{{- with .model.env -}}
  {{- $more := . -}}
  {{- range $pod.initContainers -}}{{- $_ := set . "env" (concat .env $more) -}}{{- end -}}
{{- end -}}
{{- $image := printf "%s:%s" .root.Values.image.repository .root.Values.image.tag -}}
{{- with .root.Values.image.digest -}}{{- $image = printf "%s@%s" $image . -}}{{- end -}}
{{- range concat $pod.containers $pod.initContainers -}}
  {{- $_ := set . "image" $image -}}
  {{- range .env -}}
    {{- if dig "valueFrom" "secretKeyRef" "" . -}}
      {{- $_ := set .valueFrom.secretKeyRef "name" (include "vllm-compress.secret" $.root) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $name := .name -}}
{{- range $pod.volumes -}}
  {{- $volume := . -}}
  {{- range $change.volumes -}}
    {{- if eq .name $volume.name -}}{{- $_ := mergeOverwrite $volume . -}}{{- end -}}
  {{- end -}}
  {{- if eq .name "config" -}}{{- $_ := set .configMap "name" (printf "vllm-compress-%s" $name) -}}{{- end -}}
  {{- if eq .name "cache" -}}{{- $_ := set .persistentVolumeClaim "claimName" (include "vllm-compress.claim" $.root) -}}{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{- define "vllm-compress.secret" -}}
{{- default "vllm-compress" .Values.existingSecret -}}
{{- end -}}

{{- define "vllm-compress.claim" -}}
{{- default "vllm-model-cache" .Values.cache.existingClaim -}}
{{- end -}}
