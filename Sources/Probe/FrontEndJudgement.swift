import VhostUser
import VirtioSpec

/// What one front end would make of a back end, by what it insists on.
struct FrontEndJudgement: Sendable {
  let frontEnd: String
  var works = true
  var remarks: [String] = []

  mutating func needs(_ condition: Bool, _ sentence: String) {
    guard !condition else { return }
    works = false
    remarks.append(sentence)
  }

  mutating func wishes(_ condition: Bool, _ sentence: String) {
    if !condition { remarks.append(sentence) }
  }
}

extension InfoCard {
  /// Rules of the front ends as their sources have them.
  var judgements: [FrontEndJudgement] {
    let features = offer.features
    let protocolFeatures = offer.protocolFeatures
    let needsConfiguration = [DeviceID.block, .scsi, .gpu, .input].contains(guess.device)
    let hasConfiguration = protocolFeatures.contains(.config) && offer.configuration != nil

    var martlet = FrontEndJudgement(frontEnd: "Martlet")
    martlet.needs(features.contains(.version1), "needs VERSION_1: there are no legacy devices")
    martlet.needs(!needsConfiguration || hasConfiguration, "needs the configuration space of a \(guess.device?.name ?? "device") (CONFIG)")
    martlet.wishes(protocolFeatures.contains(.replyAck), "no REPLY_ACK: set-up errors show late")
    martlet.wishes(
      protocolFeatures.contains(.inflightShmFD) || guess.device != .block,
      "no INFLIGHT_SHMFD: requests in flight are lost with the back end")
    martlet.wishes(protocolFeatures.contains(.resetDevice), "no RESET_DEVICE: a guest's reset only stops the rings")

    var qemu = FrontEndJudgement(frontEnd: "QEMU")
    qemu.needs(!needsConfiguration || protocolFeatures.contains(.config), "needs CONFIG for this device")
    qemu.needs(
      !features.contains(.accessPlatform) || protocolFeatures.isSuperset(of: [.backEndRequests, .replyAck]),
      "needs BACKEND_REQ and REPLY_ACK with ACCESS_PLATFORM")
    qemu.wishes(
      protocolFeatures.contains(.logShmFD) && features.contains(.vhostLogAll) || protocolFeatures.contains(.deviceState),
      "no LOG_SHMFD with LOG_ALL: no live migration")
    qemu.wishes(protocolFeatures.contains(.mq), "no MQ: one queue (pair) only")
    qemu.wishes(guess.device != .block || protocolFeatures.contains(.inflightShmFD), "no INFLIGHT_SHMFD: a reconnect may lose requests")
    qemu.wishes(protocolFeatures.contains(.configureMemSlots), "no CONFIGURE_MEM_SLOTS: at most 8 memory regions, so little memory hotplug")

    var hypervisor = FrontEndJudgement(frontEnd: "Cloud Hypervisor")
    hypervisor.needs(features.contains(.vhostUserProtocolFeatures), "needs PROTOCOL_FEATURES")
    hypervisor.needs(features.contains(.version1), "needs VERSION_1")
    hypervisor.needs(guess.device != .block || protocolFeatures.contains(.config), "needs CONFIG for a disk")
    hypervisor.wishes(protocolFeatures.contains(.mq), "no MQ: one queue (pair) only")
    hypervisor.wishes(protocolFeatures.contains(.configureMemSlots), "no CONFIGURE_MEM_SLOTS: no memory hotplug")
    hypervisor.wishes(protocolFeatures.contains(.replyAck), "no REPLY_ACK: it waits for nothing")
    return [martlet, qemu, hypervisor]
  }
}
