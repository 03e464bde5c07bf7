import Testing
import VirtioSpec
import VirtioTransport

@Suite("Common configuration")
struct CommonConfigurationTests {
  typealias Common = VirtioPCI.Common

  @Test func featuresAreReadInHalvesAndNothingBeyond() throws {
    var driver = try GuestDriver()
    let offered = GuestDriver.offered.rawValue
    for (select, expected) in [(0, offered & 0xFFFF_FFFF), (1, offered >> 32), (2, 0), (3, 0), (4, 0), (0xFFFF_FFFF, 0)]
      as [(UInt64, UInt64)]
    {
      driver.write(Common.deviceFeatureSelect, select)
      #expect(driver.read(Common.deviceFeature) == expected)
    }
    driver.write(Common.driverFeatureSelect, 2)
    driver.write(Common.driverFeature, 0xFFFF_FFFF)
    #expect(driver.read(Common.driverFeature) == 0)
    #expect(driver.function.state.accepted == [])
  }

  @Test func everyBitNeverOfferedIsRefusedAloneAndTogether() throws {
    for bit in 0..<64 where !GuestDriver.offered.contains(FeatureSet(bit: bit)) {
      var driver = try GuestDriver()
      driver.accept([.version1, FeatureSet(bit: bit)])
      #expect(driver.status == [.acknowledge, .driver], "bit \(bit)")
      driver.status = [.acknowledge, .driver, .featuresOK, .driverOK]
      #expect(driver.takeEffects() == [])
    }
    var driver = try GuestDriver()
    driver.accept(FeatureSet(rawValue: .max))
    #expect(driver.status == [.acknowledge, .driver])
  }

  @Test func driverWithoutVersionOneOrWithUnmetDependenciesIsRefused() throws {
    var old = try GuestDriver()
    old.accept([.eventIndex])
    #expect(!old.status.contains(.featuresOK))
    var net = try GuestDriver(device: .net, offered: [.version1, .netChecksum, .netHostTSO4], configuration: [])
    net.accept([.version1, .netHostTSO4])
    #expect(!net.status.contains(.featuresOK))
    net.accept([.version1, .netHostTSO4, .netChecksum])
    #expect(net.status.contains(.featuresOK))
  }

  @Test func featuresAreFrozenByFeaturesOK() throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.write(Common.driverFeatureSelect, 0)
    driver.write(Common.driverFeature, FeatureSet.eventIndex.rawValue)
    #expect(driver.function.state.accepted == .version1)
    #expect(driver.status.contains(.featuresOK))
  }

  @Test func statusBitsCannotBeClearedOneByOne() throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.status = .acknowledge
    #expect(driver.status == [.acknowledge, .driver, .featuresOK])
    driver.status = [.needsReset, .suspend]
    #expect(driver.status == [.acknowledge, .driver, .featuresOK])
    driver.status = .failed
    #expect(driver.status == [.acknowledge, .driver, .featuresOK, .failed])
  }

  @Test func driverOKNeedsFeaturesOK() throws {
    var driver = try GuestDriver()
    driver.status = [.acknowledge, .driver, .driverOK]
    #expect(driver.status == [.acknowledge, .driver])
    #expect(driver.takeEffects() == [])
  }

  @Test func driverOKActivatesTheEnabledQueuesOnce() throws {
    var driver = try GuestDriver()
    driver.accept([.version1, .eventIndex])
    driver.setUp(queue: 1, size: 32, vector: 2, base: 0x1_0000_0000)
    driver.status = [.acknowledge, .driver, .featuresOK, .driverOK]
    let expected = Activation(
      features: [.version1, .eventIndex],
      queues: [
        QueueGeometry(
          index: 1, size: 32, descriptors: 0x1_0010_0000, driver: 0x1_0010_4000, device: 0x1_0010_8000, vector: 2)
      ])
    #expect(driver.takeEffects() == [.activate(expected)])
    driver.status = [.acknowledge, .driver, .featuresOK, .driverOK]
    #expect(driver.takeEffects() == [])
  }

  @Test func resetValuesAreTheSpecifications() throws {
    var driver = try GuestDriver()
    #expect(driver.read(Common.configurationVector, 2) == 0xFFFF)
    #expect(driver.read(Common.queueCount, 2) == 2)
    for (queue, size) in [(0, 256), (1, 128)] as [(UInt64, UInt64)] {
      driver.write(Common.queueSelect, queue, 2)
      #expect(driver.read(Common.queueSize, 2) == size)
      #expect(driver.read(Common.queueVector, 2) == 0xFFFF)
      #expect(driver.read(Common.queueEnable, 2) == 0)
      #expect(driver.read(Common.queueNotifyOffset, 2) == queue)
      #expect(driver.read(Common.queueDescriptors, 8) == 0)
    }
  }

  @Test(arguments: [2, 3, 0x100, 0x7FFF, 0x8000, 0xFFFF])
  func queueThatDoesNotExistHasSizeZeroAndIgnoresWrites(queue: UInt64) throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.setUp(queue: Int(queue), size: 64)
    #expect(driver.read(Common.queueSelect, 2) == queue)
    #expect(driver.read(Common.queueSize, 2) == 0)
    #expect(driver.read(Common.queueEnable, 2) == 0)
    #expect(driver.read(Common.queueVector, 2) == 0xFFFF)
    #expect(driver.read(Common.queueDescriptors, 8) == 0)
    driver.status = [.acknowledge, .driver, .featuresOK, .driverOK]
    #expect(driver.takeEffects() == [.activate(Activation(features: .version1, queues: []))])
  }

  @Test func sizesOutOfRangeAreIgnored() throws {
    var driver = try GuestDriver()
    driver.write(Common.queueSelect, 0, 2)
    for size in [0, 257, 0x8000, 0xFFFF] as [UInt64] {
      driver.write(Common.queueSize, size, 2)
      #expect(driver.read(Common.queueSize, 2) == 256)
    }
  }

  @Test func unsoundQueueCannotBeEnabled() throws {
    for (offset, value, width) in [
      (Common.queueSize, 100, 2), (Common.queueDescriptors, 0x1008, 4), (Common.queueDriver, 0x1001, 4),
      (Common.queueDevice, 0x1002, 4),
    ] as [(Int, UInt64, Int)] {
      var driver = try GuestDriver()
      driver.accept([.version1])
      driver.write(Common.queueSelect, 0, 2)
      driver.write(offset, value, width)
      driver.write(Common.queueEnable, 1, 2)
      #expect(driver.read(Common.queueEnable, 2) == 0, "register \(offset)")
    }
  }

  @Test func packedQueueMayHaveAnySizeButFourByteAlignedEvents() throws {
    var driver = try GuestDriver()
    driver.accept([.version1, .packedRing])
    driver.setUp(queue: 0, size: 100)
    #expect(driver.read(Common.queueEnable, 2) == 1)
    driver.write(Common.queueSelect, 1, 2)
    driver.write(Common.queueDriver, 0x1002, 4)
    driver.write(Common.queueEnable, 1, 2)
    #expect(driver.read(Common.queueEnable, 2) == 0)
  }

  @Test func queueCannotBeEnabledBeforeFeaturesOK() throws {
    var driver = try GuestDriver()
    driver.setUp(queue: 0, size: 64)
    #expect(driver.read(Common.queueEnable, 2) == 0)
  }

  @Test func enabledQueueIsFrozen() throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.setUp(queue: 0, size: 64)
    driver.write(Common.queueSize, 16, 2)
    driver.write(Common.queueDescriptors, 0xDEAD_0000)
    driver.write(Common.queueDevice, 0xDEAD_0000, 8)
    driver.write(Common.queueEnable, 0, 2)
    #expect(driver.read(Common.queueSize, 2) == 64)
    #expect(driver.read(Common.queueDescriptors, 8) == 0x10_0000)
    #expect(driver.read(Common.queueDevice, 8) == 0x10_8000)
    #expect(driver.read(Common.queueEnable, 2) == 1)
  }

  @Test func queueLeftOutAtDriverOKCannotBeEnabledLater() throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.setUp(queue: 0, size: 64)
    driver.status = [.acknowledge, .driver, .featuresOK, .driverOK]
    _ = driver.takeEffects()
    driver.setUp(queue: 1, size: 64)
    #expect(driver.read(Common.queueEnable, 2) == 0)
    #expect(driver.read(Common.queueSize, 2) == 128)
    #expect(driver.takeEffects() == [])
  }

  @Test func resetOfAnActiveDeviceEndsOnlyWhenItsQueuesHaveStopped() throws {
    var driver = try GuestDriver()
    driver.start()
    _ = driver.takeEffects()
    driver.status = []
    #expect(driver.takeEffects() == [.reset])
    #expect(driver.status == [.acknowledge, .driver, .featuresOK, .driverOK])
    driver.status = []
    driver.status = [.acknowledge]
    driver.write(Common.queueSelect, 0, 2)
    driver.write(Common.configurationVector, 1, 2)
    driver.write(0x4000, 0, 2)
    driver.write(0x2000 + 32, 9, 1)
    #expect(driver.takeEffects() == [])
    #expect(driver.read(Common.configurationVector, 2) == 0)
    driver.function.resetCompleted()
    #expect(driver.status == [])
    driver.write(Common.queueSelect, 0, 2)
    #expect(driver.read(Common.queueSize, 2) == 256)
    #expect(driver.read(Common.queueEnable, 2) == 0)
    #expect(driver.read(Common.queueVector, 2) == 0xFFFF)
    #expect(driver.read(Common.configurationVector, 2) == 0xFFFF)
    #expect(driver.read(Common.driverFeature) == 0)
    driver.start()
    #expect(driver.takeEffects().count == 1)
  }

  @Test func resetOfAnInactiveDeviceIsImmediate() throws {
    var driver = try GuestDriver()
    driver.accept([.version1])
    driver.setUp(queue: 0, size: 64)
    driver.status = []
    #expect(driver.status == [])
    #expect(driver.takeEffects() == [])
    driver.function.resetCompleted()
    #expect(driver.status == [])
  }

  @Test func lateCompletionOfAResetDoesNotHarmAnActiveDevice() throws {
    var driver = try GuestDriver()
    driver.start()
    driver.function.resetCompleted()
    #expect(driver.status.contains(.driverOK))
  }

  @Test func vectorThatDoesNotExistReadsBackAsNone() throws {
    var driver = try GuestDriver()
    driver.write(Common.configurationVector, 2, 2)
    #expect(driver.read(Common.configurationVector, 2) == 2)
    driver.write(Common.configurationVector, 3, 2)
    #expect(driver.read(Common.configurationVector, 2) == 0xFFFF)
    driver.write(Common.queueSelect, 0, 2)
    driver.write(Common.queueVector, 0x7FFF, 2)
    #expect(driver.read(Common.queueVector, 2) == 0xFFFF)
  }

  @Test func vectorOfALiveQueueMayMove() throws {
    var driver = try GuestDriver()
    driver.start()
    _ = driver.takeEffects()
    driver.write(Common.queueSelect, 1, 2)
    driver.write(Common.queueVector, 1, 2)
    driver.write(Common.queueVector, 1, 2)
    driver.write(Common.queueVector, 0xFFFF, 2)
    #expect(driver.takeEffects() == [.queueVectorChanged(queue: 1, vector: 1), .queueVectorChanged(queue: 1, vector: nil)])
  }

  @Test func singleQueueResetOpensItForSetUp() throws {
    var driver = try GuestDriver()
    driver.start()
    _ = driver.takeEffects()
    driver.write(Common.queueSelect, 1, 2)
    driver.write(Common.queueReset, 1, 2)
    driver.write(Common.queueReset, 1, 2)
    #expect(driver.takeEffects() == [.queueReset(1)])
    #expect(driver.read(Common.queueReset, 2) == 1)
    driver.write(0x4004, 1, 2)
    driver.setUp(queue: 1, size: 16)
    #expect(driver.takeEffects().filter { if case .queueVectorChanged = $0 { false } else { true } } == [])
    driver.function.queueResetCompleted(1)
    #expect(driver.read(Common.queueReset, 2) == 0)
    #expect(driver.read(Common.queueEnable, 2) == 0)
    #expect(driver.read(Common.queueSize, 2) == 128)
    driver.setUp(queue: 1, size: 16, vector: 2)
    let geometry = QueueGeometry(
      index: 1, size: 16, descriptors: 0x20_0000, driver: 0x20_4000, device: 0x20_8000, vector: 2)
    #expect(driver.takeEffects() == [.queueEnabled(geometry)])
    driver.write(0x4004, 1, 2)
    #expect(driver.takeEffects() == [.notify(queue: 1)])
    driver.write(Common.queueSize, 32, 2)
    #expect(driver.read(Common.queueSize, 2) == 16)
  }

  @Test func queueResetNeedsTheFeature() throws {
    var driver = try GuestDriver()
    driver.start([.version1])
    _ = driver.takeEffects()
    driver.write(Common.queueReset, 1, 2)
    #expect(driver.takeEffects() == [])
    #expect(driver.read(Common.queueReset, 2) == 0)
  }

  @Test func notificationsCountOnlyForLiveQueues() throws {
    var driver = try GuestDriver()
    driver.write(0x4000, 0, 2)
    #expect(driver.takeEffects() == [])
    driver.start()
    _ = driver.takeEffects()
    driver.write(0x4000, 0, 2)
    driver.write(0x4004, 0xFFFF_FFFF, 4)
    driver.write(0x4000, 0, 1)
    #expect(driver.takeEffects() == [.notify(queue: 0), .notify(queue: 1), .notify(queue: 0)])
    driver.write(0x4002, 0, 2)
    driver.write(0x4008, 2, 2)
    driver.write(0x7FFC, 0, 4)
    #expect(driver.takeEffects() == [])
  }

  @Test func wideAccessTouchesEachRegisterInOrder() throws {
    var driver = try GuestDriver()
    driver.write(Common.deviceFeatureSelect, 1, 8)
    #expect(driver.read(Common.deviceFeature) == GuestDriver.offered.rawValue >> 32)
    // Status, generation, queue select and queue size in one eight-byte write: the size belongs to the new queue.
    driver.write(Common.deviceStatus, 0x0040_0001_0001, 8)
    #expect(driver.status == .acknowledge)
    #expect(driver.read(Common.queueSelect, 2) == 1)
    #expect(driver.read(Common.queueSize, 2) == 64)
    driver.write(Common.queueSelect, 0, 2)
    #expect(driver.read(Common.queueSize, 2) == 256)
    driver.write(Common.queueDescriptors + 3, 0xAB, 1)
    #expect(driver.read(Common.queueDescriptors, 8) == 0xAB00_0000)
    driver.write(Common.queueDescriptors + 2, 0x1234_5678)
    #expect(driver.read(Common.queueDescriptors, 8) == 0x1234_5678_0000)
  }

  @Test func readsAtAnyWidthAgreeWithTheBytes() throws {
    var driver = try GuestDriver()
    driver.start()
    for offset in 0..<70 {
      for width in 1...8 {
        var expected: UInt64 = 0
        for index in 0..<width { expected |= driver.read(offset + index, 1) << UInt64(8 * index) }
        #expect(driver.read(offset, width) == expected, "offset \(offset), width \(width)")
      }
    }
  }
}
