// Feature bits of single device kinds (virtio 1.4, section 5; linux/virtio_blk.h, virtio_net.h, ...). The constants
// carry their device in the name: `.blockReadOnly` and `.netMAC` are the same bit.

extension FeatureSet {
  /// `VIRTIO_BLK_F_SIZE_MAX`
  @inlinable public static var blockSizeMax: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_BLK_F_SEG_MAX`
  @inlinable public static var blockSegMax: FeatureSet { FeatureSet(bit: 2) }
  /// `VIRTIO_BLK_F_GEOMETRY`
  @inlinable public static var blockGeometry: FeatureSet { FeatureSet(bit: 4) }
  /// `VIRTIO_BLK_F_RO`
  @inlinable public static var blockReadOnly: FeatureSet { FeatureSet(bit: 5) }
  /// `VIRTIO_BLK_F_BLK_SIZE`
  @inlinable public static var blockBlockSize: FeatureSet { FeatureSet(bit: 6) }
  /// `VIRTIO_BLK_F_FLUSH`
  @inlinable public static var blockFlush: FeatureSet { FeatureSet(bit: 9) }
  /// `VIRTIO_BLK_F_TOPOLOGY`
  @inlinable public static var blockTopology: FeatureSet { FeatureSet(bit: 10) }
  /// `VIRTIO_BLK_F_CONFIG_WCE`
  @inlinable public static var blockConfigWriteCache: FeatureSet { FeatureSet(bit: 11) }
  /// `VIRTIO_BLK_F_MQ`
  @inlinable public static var blockMultipleQueues: FeatureSet { FeatureSet(bit: 12) }
  /// `VIRTIO_BLK_F_DISCARD`
  @inlinable public static var blockDiscard: FeatureSet { FeatureSet(bit: 13) }
  /// `VIRTIO_BLK_F_WRITE_ZEROES`
  @inlinable public static var blockWriteZeroes: FeatureSet { FeatureSet(bit: 14) }
  /// `VIRTIO_BLK_F_LIFETIME`
  @inlinable public static var blockLifetime: FeatureSet { FeatureSet(bit: 15) }
  /// `VIRTIO_BLK_F_SECURE_ERASE`
  @inlinable public static var blockSecureErase: FeatureSet { FeatureSet(bit: 16) }
  /// `VIRTIO_BLK_F_ZONED`
  @inlinable public static var blockZoned: FeatureSet { FeatureSet(bit: 17) }
}

extension FeatureSet {
  /// `VIRTIO_NET_F_CSUM`
  @inlinable public static var netChecksum: FeatureSet { FeatureSet(bit: 0) }
  /// `VIRTIO_NET_F_GUEST_CSUM`
  @inlinable public static var netGuestChecksum: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`
  @inlinable public static var netControlGuestOffloads: FeatureSet { FeatureSet(bit: 2) }
  /// `VIRTIO_NET_F_MTU`
  @inlinable public static var netMTU: FeatureSet { FeatureSet(bit: 3) }
  /// `VIRTIO_NET_F_MAC`
  @inlinable public static var netMAC: FeatureSet { FeatureSet(bit: 5) }
  /// `VIRTIO_NET_F_GUEST_TSO4`
  @inlinable public static var netGuestTSO4: FeatureSet { FeatureSet(bit: 7) }
  /// `VIRTIO_NET_F_GUEST_TSO6`
  @inlinable public static var netGuestTSO6: FeatureSet { FeatureSet(bit: 8) }
  /// `VIRTIO_NET_F_GUEST_ECN`
  @inlinable public static var netGuestECN: FeatureSet { FeatureSet(bit: 9) }
  /// `VIRTIO_NET_F_GUEST_UFO`
  @inlinable public static var netGuestUFO: FeatureSet { FeatureSet(bit: 10) }
  /// `VIRTIO_NET_F_HOST_TSO4`
  @inlinable public static var netHostTSO4: FeatureSet { FeatureSet(bit: 11) }
  /// `VIRTIO_NET_F_HOST_TSO6`
  @inlinable public static var netHostTSO6: FeatureSet { FeatureSet(bit: 12) }
  /// `VIRTIO_NET_F_HOST_ECN`
  @inlinable public static var netHostECN: FeatureSet { FeatureSet(bit: 13) }
  /// `VIRTIO_NET_F_HOST_UFO`
  @inlinable public static var netHostUFO: FeatureSet { FeatureSet(bit: 14) }
  /// `VIRTIO_NET_F_MRG_RXBUF`
  @inlinable public static var netMergeableReceiveBuffers: FeatureSet { FeatureSet(bit: 15) }
  /// `VIRTIO_NET_F_STATUS`
  @inlinable public static var netStatus: FeatureSet { FeatureSet(bit: 16) }
  /// `VIRTIO_NET_F_CTRL_VQ`
  @inlinable public static var netControlQueue: FeatureSet { FeatureSet(bit: 17) }
  /// `VIRTIO_NET_F_CTRL_RX`
  @inlinable public static var netControlReceive: FeatureSet { FeatureSet(bit: 18) }
  /// `VIRTIO_NET_F_CTRL_VLAN`
  @inlinable public static var netControlVLAN: FeatureSet { FeatureSet(bit: 19) }
  /// `VIRTIO_NET_F_CTRL_RX_EXTRA`
  @inlinable public static var netControlReceiveExtra: FeatureSet { FeatureSet(bit: 20) }
  /// `VIRTIO_NET_F_GUEST_ANNOUNCE`
  @inlinable public static var netGuestAnnounce: FeatureSet { FeatureSet(bit: 21) }
  /// `VIRTIO_NET_F_MQ`
  @inlinable public static var netMultipleQueues: FeatureSet { FeatureSet(bit: 22) }
  /// `VIRTIO_NET_F_CTRL_MAC_ADDR`
  @inlinable public static var netControlMACAddress: FeatureSet { FeatureSet(bit: 23) }
  /// `VIRTIO_NET_F_DEVICE_STATS`
  @inlinable public static var netDeviceStatistics: FeatureSet { FeatureSet(bit: 50) }
  /// `VIRTIO_NET_F_HASH_TUNNEL`
  @inlinable public static var netHashTunnel: FeatureSet { FeatureSet(bit: 51) }
  /// `VIRTIO_NET_F_VQ_NOTF_COAL`
  @inlinable public static var netQueueNotificationCoalescing: FeatureSet { FeatureSet(bit: 52) }
  /// `VIRTIO_NET_F_NOTF_COAL`
  @inlinable public static var netNotificationCoalescing: FeatureSet { FeatureSet(bit: 53) }
  /// `VIRTIO_NET_F_GUEST_USO4`
  @inlinable public static var netGuestUSO4: FeatureSet { FeatureSet(bit: 54) }
  /// `VIRTIO_NET_F_GUEST_USO6`
  @inlinable public static var netGuestUSO6: FeatureSet { FeatureSet(bit: 55) }
  /// `VIRTIO_NET_F_HOST_USO`
  @inlinable public static var netHostUSO: FeatureSet { FeatureSet(bit: 56) }
  /// `VIRTIO_NET_F_HASH_REPORT`
  @inlinable public static var netHashReport: FeatureSet { FeatureSet(bit: 57) }
  /// `VIRTIO_NET_F_GUEST_HDRLEN`
  @inlinable public static var netGuestHeaderLength: FeatureSet { FeatureSet(bit: 59) }
  /// `VIRTIO_NET_F_RSS`
  @inlinable public static var netReceiveSideScaling: FeatureSet { FeatureSet(bit: 60) }
  /// `VIRTIO_NET_F_RSC_EXT`
  @inlinable public static var netReceiveCoalescingExtended: FeatureSet { FeatureSet(bit: 61) }
  /// `VIRTIO_NET_F_STANDBY`
  @inlinable public static var netStandby: FeatureSet { FeatureSet(bit: 62) }
  /// `VIRTIO_NET_F_SPEED_DUPLEX`
  @inlinable public static var netSpeedDuplex: FeatureSet { FeatureSet(bit: 63) }
}

extension FeatureSet {
  /// `VIRTIO_CONSOLE_F_SIZE`
  @inlinable public static var consoleSize: FeatureSet { FeatureSet(bit: 0) }
  /// `VIRTIO_CONSOLE_F_MULTIPORT`
  @inlinable public static var consoleMultiplePorts: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_CONSOLE_F_EMERG_WRITE`
  @inlinable public static var consoleEmergencyWrite: FeatureSet { FeatureSet(bit: 2) }
}

extension FeatureSet {
  /// `VIRTIO_FS_F_NOTIFICATION`
  @inlinable public static var fileSystemNotification: FeatureSet { FeatureSet(bit: 0) }
}

extension FeatureSet {
  /// `VIRTIO_BALLOON_F_MUST_TELL_HOST`
  @inlinable public static var balloonMustTellHost: FeatureSet { FeatureSet(bit: 0) }
  /// `VIRTIO_BALLOON_F_STATS_VQ`
  @inlinable public static var balloonStatisticsQueue: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`
  @inlinable public static var balloonDeflateOnOutOfMemory: FeatureSet { FeatureSet(bit: 2) }
  /// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`
  @inlinable public static var balloonFreePageHint: FeatureSet { FeatureSet(bit: 3) }
  /// `VIRTIO_BALLOON_F_PAGE_POISON`
  @inlinable public static var balloonPagePoison: FeatureSet { FeatureSet(bit: 4) }
  /// `VIRTIO_BALLOON_F_PAGE_REPORTING`
  @inlinable public static var balloonPageReporting: FeatureSet { FeatureSet(bit: 5) }
}

extension FeatureSet {
  /// `VIRTIO_VSOCK_F_STREAM`
  @inlinable public static var vsockStream: FeatureSet { FeatureSet(bit: 0) }
  /// `VIRTIO_VSOCK_F_SEQPACKET`
  @inlinable public static var vsockSequencedPackets: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_VSOCK_F_NO_IMPLIED_STREAM`
  @inlinable public static var vsockNoImpliedStream: FeatureSet { FeatureSet(bit: 2) }
}

extension FeatureSet {
  /// `VIRTIO_PMEM_F_SHMEM_REGION`
  @inlinable public static var persistentMemorySharedMemoryRegion: FeatureSet { FeatureSet(bit: 0) }
}

extension FeatureSet {
  /// `VIRTIO_SCSI_F_INOUT`
  @inlinable public static var scsiInOut: FeatureSet { FeatureSet(bit: 0) }
  /// `VIRTIO_SCSI_F_HOTPLUG`
  @inlinable public static var scsiHotplug: FeatureSet { FeatureSet(bit: 1) }
  /// `VIRTIO_SCSI_F_CHANGE`
  @inlinable public static var scsiChange: FeatureSet { FeatureSet(bit: 2) }
  /// `VIRTIO_SCSI_F_T10_PI`
  @inlinable public static var scsiProtectionInformation: FeatureSet { FeatureSet(bit: 3) }
}
