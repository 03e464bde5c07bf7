extension FeatureSet {
  /// A feature that means nothing without another one: `feature` needs at least one bit of each set of `needs`.
  struct Dependency {
    let feature: FeatureSet
    let needs: [FeatureSet]
  }

  /// The features of this set whose dependencies are not in it; empty for a set that a device may offer and may accept.
  ///
  /// Virtio 1.4, sections 5.1.3.1 (net), 5.2.3 (block) and 6.
  public func unmetDependencies(for device: DeviceID) -> FeatureSet {
    var unmet: FeatureSet = []
    for dependency in Self.transportDependencies + Self.deviceDependencies(of: device)
    where !isDisjoint(with: dependency.feature) {
      if dependency.needs.contains(where: { isDisjoint(with: $0) }) {
        unmet.formUnion(intersection(dependency.feature))
      }
    }
    return unmet
  }

  static let transportDependencies: [Dependency] = [
    Dependency(feature: .packedRing, needs: [.version1]),
    Dependency(feature: .inOrder, needs: [.version1]),
    Dependency(feature: .ringReset, needs: [.version1]),
  ]

  static func deviceDependencies(of device: DeviceID) -> [Dependency] {
    guard device == .net else { return [] }
    return [
      Dependency(
        feature: [.netGuestTSO4, .netGuestTSO6, .netGuestUFO, .netGuestUSO4, .netGuestUSO6],
        needs: [.netGuestChecksum]),
      Dependency(feature: .netGuestECN, needs: [[.netGuestTSO4, .netGuestTSO6]]),
      Dependency(feature: [.netHostTSO4, .netHostTSO6, .netHostUFO, .netHostUSO], needs: [.netChecksum]),
      Dependency(feature: .netHostECN, needs: [[.netHostTSO4, .netHostTSO6]]),
      Dependency(
        feature: [
          .netControlReceive, .netControlVLAN, .netGuestAnnounce, .netMultipleQueues, .netControlMACAddress,
          .netReceiveSideScaling, .netNotificationCoalescing, .netQueueNotificationCoalescing,
        ],
        needs: [.netControlQueue]),
      Dependency(
        feature: .netHashTunnel, needs: [.netControlQueue, [.netReceiveSideScaling, .netHashReport]]),
      Dependency(feature: .netReceiveCoalescingExtended, needs: [[.netHostTSO4, .netHostTSO6]]),
    ]
  }
}
